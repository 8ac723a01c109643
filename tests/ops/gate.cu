// ops/gate.cpp on CUDA: the same cases.
#include "gate.cpp"
