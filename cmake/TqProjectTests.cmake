# Tests of the project as a whole: its sources' layers and format, and the installed package.
find_package(Python3 REQUIRED COMPONENTS Interpreter)

add_test(NAME project.layers COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/scripts/check_layers.py ${PROJECT_SOURCE_DIR})
add_test(NAME project.layers_check COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/project/check_layers_test.py)
add_test(NAME project.format COMMAND ${PROJECT_SOURCE_DIR}/scripts/check_format)
set_tests_properties(project.format PROPERTIES SKIP_RETURN_CODE 77)

if(TQ_SANITIZE)
  set(_flags "-fsanitize=${_sanitizers}")
endif()
if(TQ_BUILD_GGML)
  get_target_property(_ggml_include llama INTERFACE_INCLUDE_DIRECTORIES)
  list(GET _ggml_include 0 _ggml_include)
  set(_ggml_include -DGGML_INCLUDE=${_ggml_include})
endif()
add_test(NAME project.package COMMAND ${CMAKE_COMMAND} -DBUILD=${PROJECT_BINARY_DIR} -DSOURCE=${PROJECT_SOURCE_DIR}/tests/package
  -DGENERATOR=${CMAKE_GENERATOR} -DCC=${CMAKE_C_COMPILER} -DCXX=${CMAKE_CXX_COMPILER} ${_ggml_include} -DFLAGS=${_flags} -DWORK=${PROJECT_BINARY_DIR}/package-test
  -DCOMMAND_LINE=${TQ_BUILD_GGML} -P ${PROJECT_SOURCE_DIR}/tests/package/run.cmake)

# Unmodified processes beside our command: a program that links libllama only, and Python's llama_cpp.
if(TQ_BUILD_GGML)
  set(TQ_LLAMA_PYTHON ${PROJECT_SOURCE_DIR}/.venv/bin/python CACHE FILEPATH "A Python with llama_cpp, for the tests")
  add_executable(stock_logits stock/stock_logits.cpp)
  target_link_libraries(stock_logits PRIVATE llama ggml::ggml tq_options)
  add_dependencies(stock_logits ggml-turboquant)
  add_executable(test_stock stock/stock_test.cpp)
  target_link_libraries(test_stock PRIVATE turboquant_llama tq_options GTest::gtest_main)
  target_compile_definitions(test_stock PRIVATE
    TQ_DEMO_MODEL="${PROJECT_SOURCE_DIR}/models/demo.gguf" TQ_BACKEND="$<TARGET_FILE:ggml-turboquant>" TQ_SANITIZERS="${_sanitizers}"
    TQ_STOCK_LOGITS="$<TARGET_FILE:stock_logits>" TQ_STOCK_PYTHON_SCRIPT="${PROJECT_SOURCE_DIR}/tests/stock/stock_logits.py"
    TQ_LLAMA_PYTHON="${TQ_LLAMA_PYTHON}")
  gtest_discover_tests(test_stock TEST_PREFIX stock. DISCOVERY_TIMEOUT 60)

  # Python's llama_cpp as it is installed, and the commands of README.md.
  if(NOT TQ_SANITIZE)
    add_test(NAME python.module COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/python/module_test.py ${TQ_LLAMA_PYTHON} $<TARGET_FILE:ggml-turboquant>
      ${PROJECT_SOURCE_DIR}/models/demo.gguf)
    add_test(NAME project.readme COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/scripts/check_readme.py --build ${PROJECT_BINARY_DIR}
      --python ${TQ_LLAMA_PYTHON})
    set_tests_properties(python.module project.readme PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1200)
  endif()
endif()
