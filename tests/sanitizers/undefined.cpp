// Overflows a signed integer when told to.
#include <limits>
#include <string_view>

int main(int argc, char** argv) {
  const bool fault = argc > 1 && std::string_view(argv[1]) == "fault";
  volatile int number = std::numeric_limits<int>::max() - (fault ? 0 : 1);
  number = number + 1;
  return 0;
}
