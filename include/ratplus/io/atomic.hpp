#pragma once
// Files that are never seen half-written: the bytes go into a temporary file in the same folder, reach the disk, and
// only then take the name. Whoever opens the name, also after a crash or a full disk, finds the old content or the new
// one, whole.
//
// Atomicity is per file, on purpose. What must be consistent belongs into ONE file: a training checkpoint is one
// safetensors file with weights, optimiser state and counters, and config.json beside it is constant over a run.
// Folders would need either an exchange that not every file system has or a recovery step in every reader.
//
// A process that is killed while it writes leaves `NAME.tmp.<pid>.<n>` behind: never read, safe to delete.

#include <atomic>
#include <concepts>
#include <filesystem>
#include <string>
#include <string_view>

#include "ratplus/io/mapped_file.hpp"

namespace ratplus::io {

/// The file under construction: what write_atomically hands to its callback.
class output_file {
 public:
  output_file(int fd, const std::string& path) : fd_(fd), path_(path) {}

  /// Appends; throws io_error when the disk is full or the system refuses.
  void write(const void* data, std::size_t bytes) {
    const auto* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const ::ssize_t n = ::write(fd_, next, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw detail::system_error(path_, "write");
      next += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }
  void write(std::string_view text) { write(text.data(), text.size()); }

 private:
  int fd_;
  const std::string& path_;
};

namespace detail {

/// A new file `PATH.tmp.<pid>.<n>`, removed again unless it is renamed.
class temporary_file {
 public:
  explicit temporary_file(const std::string& path) : file_(-1) {
    static std::atomic<unsigned> counter{0};
    constexpr int attempts = 1000;  // names left behind by killed processes with the same pid
    for (int i = 0; i < attempts && !file_; ++i) {
      name_ = message(path, ".tmp.", ::getpid(), ".", counter++);
      file_ = descriptor(::open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      if (!file_ && errno != EEXIST) break;
    }
    if (!file_) throw system_error(path, "write");
  }
  temporary_file(const temporary_file&) = delete;
  temporary_file& operator=(const temporary_file&) = delete;
  ~temporary_file() {
    if (!renamed_) ::unlink(name_.c_str());
  }

  [[nodiscard]] int fd() const { return file_.get(); }

  void rename_to(const std::string& path) {
    if (::fsync(file_.get()) != 0) throw system_error(path, "write");
    if (!file_.close()) throw system_error(path, "write");
    if (::rename(name_.c_str(), path.c_str()) != 0) throw system_error(path, "replace");
    renamed_ = true;
  }

 private:
  std::string name_;
  descriptor file_;
  bool renamed_ = false;
};

}  // namespace detail

/// Replaces `path` by what `fill(output_file&)` writes, all or nothing. On any failure, an exception of `fill`
/// included, the previous file stays as it was and the temporary one is removed. Throws io_error with the path and the
/// system's reason. A symbolic link is followed; something that is no regular file (a folder, a device) is refused.
template <std::invocable<output_file&> Fill>
void write_atomically(const std::string& path, Fill&& fill) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::file_status status = fs::status(path, ignored);
  if (fs::exists(status) && !fs::is_regular_file(status))
    throw io_error(message(path, ": cannot replace: not a regular file"));
  const fs::path target = fs::exists(status) ? fs::canonical(path, ignored) : fs::path(path);
  const fs::path parent = target.parent_path();

  const detail::descriptor folder(::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) throw detail::system_error(path, "write");

  detail::temporary_file temporary(target.string());
  output_file out(temporary.fd(), path);
  fill(out);
  temporary.rename_to(target.string());
  // The new name must reach the disk too. Some file systems have no fsync for folders and say EINVAL.
  if (::fsync(folder.get()) != 0 && errno != EINVAL) throw detail::system_error(path, "flush the folder of");
}

/// Replaces `path` by `text`, all or nothing.
inline void write_atomically(const std::string& path, std::string_view text) {
  write_atomically(path, [&](output_file& out) { out.write(text); });
}

}  // namespace ratplus::io
