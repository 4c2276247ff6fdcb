# Installs the build to a temporary prefix, then configures, builds and runs the outside project against it, away from the source tree.
# cmake -DBUILD=... -DSOURCE=... -DGENERATOR=... -DCC=... -DCXX=... -DFLAGS=... -DWORK=... [-DGGML_INCLUDE=...] -DCOMMAND_LINE=... -P run.cmake
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
# Moved once more: an installed package must not know where it was installed first.
file(RENAME ${WORK}/prefix ${WORK}/moved)
run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/moved -DCMAKE_CXX_COMPILER=${CXX}
    -DCMAKE_CXX_FLAGS=${FLAGS} -DCMAKE_C_COMPILER=${CC} -DINSTALLED=${WORK}/moved -DGGML_INCLUDE=${GGML_INCLUDE} -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/user)
if(COMMAND_LINE)
  run(${WORK}/moved/bin/turboquant formats)
endif()
