// ops/scan.cpp on CUDA: the same cases, and more work than a device does at once.
#include "scan.cpp"

TEMPLATE_TEST_CASE("scan: more work than a device does at once", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  const auto check = [&](index_t B, index_t rows, index_t d) {
    scan_case c;
    c.B = B;
    c.H = 1;
    c.rows = rows;
    c.d = d;
    check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
    c.spans = true;
    check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
    check_scan(backend, none{}, oracle::cell_step([](double, double x, double, index_t) { return x; }), c);
  };
  check(2000, 70, 4);  // sequences enough for every block to walk eight of them,
  check(530, 70, 8);   // or two
  check(9, 2500, 8);   // few sequences: their tiles are handed out
}

// As many as fill a device: each is then walked by itself.
TEMPLATE_TEST_CASE("scan: many heads", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  scan_case c;
  c.H = 67;
  c.rows = 18;
  c.B = 32, c.d = 64;
  check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
  c.B = 16, c.d = 128;
  c.spans = c.in_place = true;
  check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
}
