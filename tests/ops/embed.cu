// ops/embed.cpp on CUDA: the same cases.
#include "embed.cpp"
