// Preloaded before the C library: kills the process at a chosen point of its writing to an SQLite write-ahead log.
//
// A write has two points, before it and when half of it has happened, and a flush two, before and after it. How much of
// the log was flushed is put into a file, so that a test may take away what a failure of the power would.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

std::atomic<long> points_left{-1};
int flushed_file = -1;

bool is_log(int file) {
    char link[64], name[4096];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name);
    return length >= 4 && !std::memcmp(name + length - 4, "-wal", 4);
}

bool is_last_point() { return points_left >= 0 && points_left-- == 0; }

void die() { kill(getpid(), SIGKILL); }

template <class Function> Function next(const char *name) { return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name)); }

using Write = ssize_t (*)(int, const void *, size_t, off64_t);
using Flush = int (*)(int);

ssize_t write_with_points(Write write, int file, const void *bytes, size_t count, off64_t place) {
    if (points_left >= 0 && is_log(file)) {
        if (is_last_point()) die();
        if (is_last_point()) {
            write(file, bytes, count / 2, place);
            die();
        }
    }
    return write(file, bytes, count, place);
}

int flush_with_points(Flush flush, int file) {
    if (points_left < 0 || !is_log(file)) return flush(file);
    if (is_last_point()) die();
    struct stat64 status;
    fstat64(file, &status);  // before the flush: what others write meanwhile may not be in it
    int result = flush(file);
    long size = status.st_size;
    static const Write write = next<Write>("pwrite64");
    write(flushed_file, &size, sizeof size, 0);
    if (is_last_point()) die();
    return result;
}

}  // namespace

extern "C" {

// From now on count, to die at the point of this number.
void arm(long number, int file) {
    flushed_file = file;
    points_left = number;
}

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t place) {
    static const Write write = next<Write>("pwrite64");
    return write_with_points(write, file, bytes, count, place);
}

ssize_t pwrite(int file, const void *bytes, size_t count, off_t place) { return pwrite64(file, bytes, count, place); }

int fdatasync(int file) {
    static const Flush flush = next<Flush>("fdatasync");
    return flush_with_points(flush, file);
}

int fsync(int file) {
    static const Flush flush = next<Flush>("fsync");
    return flush_with_points(flush, file);
}
}
