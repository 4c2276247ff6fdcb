// What our devices and their buffer types answer to ggml: memory, properties, which operations they take.
#pragma once

#include "turboquant/ggml/device.h"

namespace turboquant::ggml {

Device::Interfaces device_interfaces();

}  // namespace turboquant::ggml
