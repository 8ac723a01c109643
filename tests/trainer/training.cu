// trainer/training.cpp with --device cuda, in bfloat16.
#include "training.cpp"
