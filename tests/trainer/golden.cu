// trainer/golden.cpp with --device cuda, in float32 and in bfloat16.
#include "golden.cpp"
