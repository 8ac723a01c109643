// ops/scan_attend.cpp on CUDA: the same cases; as many heads as fill a device; and keys that nobody sees stay
// unwritten.
#include "scan_attend.cpp"

TEST_CASE("scan_attend: keys that no later query sees are not written") {
  cuda_bfloat16 backend;
  if (!ratplus::cuda::detail::tileable(backend.ctx, 64)) return;  // the kernels in question are for Hopper
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

// As many as fill a device.
TEMPLATE_TEST_CASE("scan_attend: many heads", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  scan_attend_case c;
  c.H = 67;
  c.d = 128;
  c.groups = {{7, 0, 2}};
  c.calls = {{23, 1, 20, 22, 0, 5, 12, 17, 1, 2, 3, 18, 0, 23, 4, 9}};
  check_scan_attend(backend, c);
  c.calls = {{18, 1, 7, 17, 0, 5, 16, 1, 1, 2, 3, 18, 0, 17, 4, 9},
             {1, 18, 6, 0, 17, 5, 2, 9, 17, 3, 0, 1, 16, 2, 4, 1}};
  c.past = true;
  check_scan_attend(backend, c);
}
