// ops/scan_attend.cpp on CUDA: the same cases; and keys that nobody sees stay unwritten.
#include "scan_attend.cpp"

TEST_CASE("scan_attend: keys that no later query sees are not written") {
  cuda_bfloat16 backend;
  if (backend.ctx.properties().major != 9) return;  // the kernels in question are for Hopper
  scan_attend_case c;
  c.H = 3;
  c.others_untouched = true;
  for (const numbers& n : alone)
    for (const index_t d : {64, 128}) {
      c.d = d;
      c.groups = {n};
      c.past = false;
      c.calls = {{70, 64, 17, 0}};
      check_scan_attend(backend, c);
      c.past = true;
      c.calls = {{70, 1, 30}, {20, 30, 0}, {20, 40, 33}};
      check_scan_attend(backend, c);
    }
  c.H = 4;
  c.groups = {{16, 0, 0}, {7, 0, 2}};
  check_scan_attend(backend, c);
  c.H = 68;
  c.calls = {std::vector<token_t>(16, 20)};
  check_scan_attend(backend, c);
}
