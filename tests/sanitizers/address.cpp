// Reads one element past the end of an array when told to.
#include <memory>
#include <string_view>

int main(int argc, char** argv) {
  const bool fault = argc > 1 && std::string_view(argv[1]) == "fault";
  const auto array = std::make_unique<int[]>(8);
  const volatile int index = fault ? 8 : 7;
  return array[static_cast<std::size_t>(index)];
}
