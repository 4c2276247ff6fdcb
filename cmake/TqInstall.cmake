# Install rules, and the package config for find_package(turboquant): target turboquant::turboquant, the core library. The backend and the
# command are installed beside it.
include(CMakePackageConfigHelpers)
set(_tq_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)

install(TARGETS turboquant EXPORT turboquant-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TQ_BUILD_GGML)
  install(FILES turboquant/ggml/plugin.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/turboquant/ggml)
  install(TARGETS ggml-turboquant LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  # INSTALL_RPATH_USE_LINK_PATH leaves out folders within the source tree, and .venv is one.
  get_target_property(_llama_library llama IMPORTED_LOCATION)
  if(_llama_library)
    cmake_path(GET _llama_library PARENT_PATH _llama_dir)
    set_property(TARGET turboquant_cli APPEND PROPERTY INSTALL_RPATH ${_llama_dir})
  endif()
  install(TARGETS turboquant_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  install(PROGRAMS share/turboquant/report.py DESTINATION ${CMAKE_INSTALL_DATADIR}/turboquant)
endif()
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(EXPORT turboquant-targets NAMESPACE turboquant:: DESTINATION ${_tq_config_dir})
configure_package_config_file(cmake/turboquant-config.cmake.in turboquant-config.cmake INSTALL_DESTINATION ${_tq_config_dir})
write_basic_package_version_file(turboquant-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/turboquant-config.cmake ${PROJECT_BINARY_DIR}/turboquant-config-version.cmake DESTINATION ${_tq_config_dir})
