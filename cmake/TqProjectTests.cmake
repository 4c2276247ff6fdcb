# Tests of the project as a whole: its sources' layers and format, and the installed package.
find_package(Python3 REQUIRED COMPONENTS Interpreter)

add_test(NAME project.layers COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/scripts/check_layers.py ${PROJECT_SOURCE_DIR})
add_test(NAME project.format COMMAND ${PROJECT_SOURCE_DIR}/scripts/check_format)
set_tests_properties(project.format PROPERTIES SKIP_RETURN_CODE 77)

if(TQ_SANITIZE)
  string(REPLACE ";" "," _flags "-fsanitize=${TQ_SANITIZE}")
endif()
add_test(NAME project.package COMMAND ${CMAKE_COMMAND} -DBUILD=${PROJECT_BINARY_DIR} -DSOURCE=${PROJECT_SOURCE_DIR}/tests/package
  -DGENERATOR=${CMAKE_GENERATOR} -DCXX=${CMAKE_CXX_COMPILER} -DFLAGS=${_flags} -DWORK=${PROJECT_BINARY_DIR}/package-test
  -DCOMMAND_LINE=${TQ_BUILD_GGML} -P ${PROJECT_SOURCE_DIR}/tests/package/run.cmake)
