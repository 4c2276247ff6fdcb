// The page of `turboquant report`: drawn by a Python script with matplotlib, from one JSON document.
#pragma once

#include <string>

namespace turboquant::cli {

/// The Python to draw with: `wanted` if given, else the one of the project's .venv where there is one, else python3.
std::string find_python(const std::string& wanted);

/// What keeps `python` from drawing, in words; "" if nothing does.
std::string python_problem(const std::string& python);

/// Runs the script over the document in json_path. Throws CommandError with the cause if no page was written.
void draw_page(const std::string& python, const std::string& json_path, const std::string& html_path);

}  // namespace turboquant::cli
