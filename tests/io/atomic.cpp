// A save that dies leaves the previous file: the death is a real one, of a forked process that is killed, that hits its
// file-size limit or that may not write.

#include "ratplus/io/atomic.hpp"

#include <sys/resource.h>
#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <random>
#include <thread>

#include "ratplus/io/safetensors.hpp"
#include "support/catch.hpp"
#include "support/scratch.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

/// Runs `work` in a forked process and returns how it ended, as waitpid says. `work` returns an exit status.
template <class Work>
pid_t in_child(Work&& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    int status = 99;
    try {
      status = work();
    } catch (...) {
    }
    ::_exit(status);
  }
  return child;
}

int end_of(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

/// Exit status of the child: 0 when `save` throws an io_error whose text holds all of `parts`.
template <class Save>
int refused(Save&& save, const std::vector<std::string>& parts) {
  try {
    save();
  } catch (const io_error& e) {
    for (const auto& part : parts)
      if (std::string(e.what()).find(part) == std::string::npos) return 2;
    return 0;
  }
  return 1;
}

const std::string previous(10'000, 'p');
const std::string next(300'000, 'n');

}  // namespace

TEST_CASE("atomic: writes, replaces, and leaves nothing else") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  CHECK(read_file(path) == previous);
  io::write_atomically(path, [](io::output_file& out) {
    out.write("one ");
    out.write(std::string_view("two"));
    out.write("", 0);
  });
  CHECK(read_file(path) == "one two");
  io::write_atomically(path, "");
  CHECK(read_file(path).empty());
  CHECK(folder.files() == std::vector<std::string>{"file"});
}

TEST_CASE("atomic: a name without a folder is in the current one, a link keeps pointing") {
  const scratch_folder folder;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  io::write_atomically("plain", "text");
  std::filesystem::current_path(before);
  CHECK(read_file(folder / "plain") == "text");

  std::filesystem::create_symlink("plain", folder / "link");
  io::write_atomically(folder / "link", "through the link");
  CHECK(std::filesystem::is_symlink(folder / "link"));
  CHECK(read_file(folder / "plain") == "through the link");
}

TEST_CASE("atomic: an exception while writing leaves the previous file") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  CHECK_THROWS_AS(io::write_atomically(path,
                                       [](io::output_file& out) {
                                         out.write(next);
                                         throw value_error("changed my mind");
                                       }),
                  value_error);
  CHECK(read_file(path) == previous);
  CHECK(folder.files() == std::vector<std::string>{"file"});
}

TEST_CASE("atomic: a process killed in the middle of a write leaves the previous file") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  for (const std::size_t written : {std::size_t{0}, std::size_t{1}, previous.size(), next.size()}) {
    const int status = end_of(in_child([&] {
      io::write_atomically(path, [&](io::output_file& out) {
        out.write(next.data(), written);
        ::raise(SIGKILL);
      });
      return 0;
    }));
    CHECK(WIFSIGNALED(status));
    CHECK(read_file(path) == previous);
  }
  // What the dead left behind hinders nobody.
  io::write_atomically(path, next);
  CHECK(read_file(path) == next);
}

TEST_CASE("atomic: killed at any moment, the file is always one of the versions") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  std::mt19937 random(7);
  for (int round = 0; round < 25; ++round) {
    const pid_t child = in_child([&]() -> int {
      for (;;) {
        io::write_atomically(path, next);
        io::write_atomically(path, previous);
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(500 + random() % 20'000));
    ::kill(child, SIGKILL);
    CHECK(WIFSIGNALED(end_of(child)));
    const std::string found = read_file(path);
    CHECK((found == previous || found == next));
  }
}

TEST_CASE("atomic: a full disk leaves the previous file and no rest") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  const int status = end_of(in_child([&] {
    // A file-size limit fails in the middle of the data, as a full disk does.
    ::signal(SIGXFSZ, SIG_IGN);
    const ::rlimit limit{100'000, 100'000};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 98;
    return refused([&] { io::write_atomically(path, next); }, {path, "cannot write: File too large"});
  }));
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(read_file(path) == previous);
  CHECK(folder.files() == std::vector<std::string>{"file"});
}

TEST_CASE("atomic: the same for a model's file, whose previous version still loads") {
  const scratch_folder folder;
  const std::string path = folder / "model.safetensors";
  auto values = make_tensor<float>(300, 100);
  std::fill(values.data(), values.data() + values.size(), 1.0f);
  io::safetensors_writer writer;
  writer.add("w", values);
  writer.write(path);
  std::fill(values.data(), values.data() + values.size(), 2.0f);
  const int status = end_of(in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const ::rlimit limit{50'000, 50'000};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 98;
    return refused([&] { writer.write(path); }, {path, "File too large"});
  }));
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(io::safetensors_file::open(path).read<float, 2>("w").view()(299, 99) == 1.0f);
  CHECK(folder.files() == std::vector<std::string>{"model.safetensors"});

  // A reader that has the file open keeps the version it opened.
  const auto open = io::safetensors_file::open(path);
  writer.write(path);
  CHECK(open.read<float, 2>("w").view()(0, 0) == 1.0f);
  CHECK(io::safetensors_file::open(path).read<float, 2>("w").view()(0, 0) == 2.0f);
}

TEST_CASE("atomic: a folder one may not write to is an error that says so") {
  const scratch_folder folder;
  const std::string path = folder / "file";
  io::write_atomically(path, previous);
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0555));
  const int status = end_of(in_child([&] {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) return 98;  // root may write everywhere
    return refused([&] { io::write_atomically(path, next); }, {path, "cannot write: Permission denied"});
  }));
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(read_file(path) == previous);
}

TEST_CASE("atomic: places where no file can be are errors with the reason") {
  const scratch_folder folder;
  io::write_atomically(folder / "file", previous);
  const auto fails = [](const std::string& path) {
    const auto text = message_of<io_error>([&] { io::write_atomically(path, "text"); });
    CHECK_THAT(text, contains(path));
    return text;
  };
  CHECK_THAT(fails(folder / "absent/file"), contains("No such file or directory"));
  CHECK_THAT(fails(folder / "file/file"), contains("Not a directory"));
  CHECK_THAT(fails(folder.path()), contains("not a regular file"));
  CHECK_THAT(fails("/dev/null"), contains("not a regular file"));
  CHECK_THAT(fails(""), contains("No such file or directory"));
  CHECK(std::filesystem::is_character_file("/dev/null"));
  CHECK(folder.files() == std::vector<std::string>{"file"});
}
