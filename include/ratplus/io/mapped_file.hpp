#pragma once
// A file seen as bytes: mapped read-only, so that gigabytes of weights or tokens cost address space and only the pages
// that are read cost memory. A file that is replaced by rename (as write_atomically does) stays whole for whoever has
// it open; a file that somebody else shortens in place while it is mapped cannot be guarded against.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "ratplus/core/error.hpp"

namespace ratplus::io {

namespace detail {

/// A file descriptor that closes itself.
class descriptor {
 public:
  explicit descriptor(int fd) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }

  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] explicit operator bool() const { return fd_ >= 0; }

  /// Closes now and returns the system's verdict: some file systems report a failed write only here.
  [[nodiscard]] bool close() { return ::close(std::exchange(fd_, -1)) == 0; }

 private:
  int fd_;
};

/// `PATH: cannot VERB: No space left on device`
[[nodiscard]] inline io_error system_error(const std::string& path, const char* verb, int code = errno) {
  return io_error(message(path, ": cannot ", verb, ": ", std::strerror(code)));
}

}  // namespace detail

class mapped_file {
 public:
  /// Maps a regular file; throws io_error when the system refuses or `path` is something else (a folder, a pipe).
  explicit mapped_file(const std::string& path) : path_(path) {
    const detail::descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!file) throw detail::system_error(path, "open");
    struct ::stat status = {};
    if (::fstat(file.get(), &status) != 0) throw detail::system_error(path, "stat");
    if (!S_ISREG(status.st_mode)) throw io_error(message(path, ": cannot map: not a regular file"));
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) return;  // nothing to map; mmap refuses empty ranges
    void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (data == MAP_FAILED) throw detail::system_error(path, "map");
    data_ = static_cast<const std::byte*>(data);
  }

  mapped_file(mapped_file&& other) noexcept
      : path_(std::move(other.path_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}

  mapped_file& operator=(mapped_file&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  ~mapped_file() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace ratplus::io
