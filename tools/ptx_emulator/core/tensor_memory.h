#pragma once
#include "matrix.h"
#define TENSOR_OPERATIONS
