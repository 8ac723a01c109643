// ops/step.cpp on CUDA: the same cases.
#include "step.cpp"
