// model/decode.cpp on CUDA: the same cases.
#include "decode.cpp"
