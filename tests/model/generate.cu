// model/generate.cpp on CUDA: the same cases.
#include "generate.cpp"
