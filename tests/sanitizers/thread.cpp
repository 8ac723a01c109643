// Adds up under OpenMP, with a race when told to. The correct variant uses what our kernels use: loops with implicit
// barriers, private memory, a reduction and a critical section.
#include <cstdio>
#include <string_view>
#include <vector>

int main(int argc, char** argv) {
  const bool fault = argc > 1 && std::string_view(argv[1]) == "fault";
  std::vector<double> numbers(1000);
  double sum = 0, total = 0;
  if (fault) {
#pragma omp parallel for num_threads(4)
    for (int i = 0; i < 1000; ++i) total += i;
  } else {
#pragma omp parallel num_threads(4)
    {
      std::vector<double> own(10, 1.0);
#pragma omp for
      for (int i = 0; i < 1000; ++i) numbers[static_cast<std::size_t>(i)] = i;
#pragma omp for schedule(dynamic) reduction(+ : sum)
      for (int i = 0; i < 1000; ++i) sum += numbers[static_cast<std::size_t>(999 - i)];
      own[0] += numbers[3];
#pragma omp critical
      total += own[0];
    }
  }
  std::printf("%g %g\n", sum, total);
}
