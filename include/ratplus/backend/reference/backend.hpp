#pragma once
// Every operation of ops/ on reference::context.

#include "ratplus/backend/reference/attend.hpp"
#include "ratplus/backend/reference/embed.hpp"
#include "ratplus/backend/reference/gate.hpp"
#include "ratplus/backend/reference/gelu.hpp"
#include "ratplus/backend/reference/loss.hpp"
#include "ratplus/backend/reference/matmul.hpp"
#include "ratplus/backend/reference/memory.hpp"
#include "ratplus/backend/reference/norm.hpp"
#include "ratplus/backend/reference/sample.hpp"
#include "ratplus/backend/reference/scan.hpp"
#include "ratplus/backend/reference/step.hpp"
