#pragma once
// ratplus on the host: patterns, recurrence cells, operations, the CPU and the reference backend, model and training.
// Needs Eigen, and OpenMP for more than one thread. CUDA is in ratplus/cuda.cuh; files (safetensors, config.json,
// tokens) are in ratplus/io/.

#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/model/generate.hpp"
#include "ratplus/model/language_model.hpp"
#include "ratplus/pattern/describe.hpp"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/pattern/schedule.hpp"
#include "ratplus/recurrence/by_name.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "ratplus/train/joint_step.hpp"
