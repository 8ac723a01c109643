#pragma once
// The CPU backend: operations in float32 on the vector unit and OpenMP threads; the rest is the reference's.

#include "ratplus/backend/cpu/attend.hpp"
#include "ratplus/backend/cpu/attend_backward.hpp"
#include "ratplus/backend/cpu/embed.hpp"
#include "ratplus/backend/cpu/gate.hpp"
#include "ratplus/backend/cpu/gelu.hpp"
#include "ratplus/backend/cpu/loss.hpp"
#include "ratplus/backend/cpu/matmul.hpp"
#include "ratplus/backend/cpu/memory.hpp"
#include "ratplus/backend/cpu/norm.hpp"
#include "ratplus/backend/cpu/scan.hpp"
#include "ratplus/backend/cpu/step.hpp"
