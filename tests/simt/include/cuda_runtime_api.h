// The runtime's part of cuda_runtime.h, by its other name.
#pragma once

#include "cuda_runtime.h"
