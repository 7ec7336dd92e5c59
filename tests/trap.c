/* Counts the calls of a process that change files, and does something at one of them. Where `under` names a directory,
 * every call that looks at or reads something below it counts too.
 *
 * Loaded with LD_PRELOAD, so it sees what CPython, numpy and ctypes ask of the C library. What it is to do stands in a
 * file that it maps (TRAP_FILE) and that forked processes share: the calls of all of them are one sequence.
 * tests/killing.py writes that file and knows its layout.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#define FICLONE 0x40049409UL
#define FICLONERANGE 0x4020940DUL
#define SHUTDOWN 0x8004587DUL /* EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum { NOTHING, KILL, KILL_ALL, KILL_PARENT, HALF, POWER, RAISE, FAIL, SHORT, SKIP, STOP, DENY, HOLD };

struct trap {
    int64_t count; /* calls so far */
    int64_t at;    /* the call, from 1, at which something is done; 0: none */
    int64_t until; /* the last such call; 0: that one only */
    int64_t used;  /* bytes of the log */
    int32_t armed, action, number, slow_ms, hit, no_exchange, ours, held; /* held: who waits for that to be 0 */
    char only[64];   /* of calls of this name alone; empty: of any */
    char mount[256]; /* what loses its power */
    char under[256]; /* below it reads count; empty: nowhere */
    int64_t skip;    /* the call, from 1, that is not made and said to have succeeded; 0: none */
    char log[];
};

static struct trap *trap;
static int64_t room;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("TRAP_FILE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        return;
    trap = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    room = status.st_size - (int64_t)sizeof *trap;
    close(fd);
}

static const char *name_of(int fd, char *into)
{
    char link[64];
    if (fd == AT_FDCWD)
        return getcwd(into, PATH_MAX) ? into : "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, into, PATH_MAX - 1);
    into[n < 0 ? 0 : n] = 0;
    return into;
}

static const char *full(int dir, const char *path, char *into)
{
    char folder[PATH_MAX];
    if (path[0] == '/')
        return path;
    snprintf(into, 2 * PATH_MAX, "%s/%s", name_of(dir, folder), path);
    return into;
}

static void note(const char *call, const char *a, const char *b, long long x, long long y, long long result)
{
    char line[6 * PATH_MAX];
    int n = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\t%lld\t%lld\t%lld\n", getpid(), call, a, b, x, y, result);
    int64_t at = __atomic_fetch_add(&trap->used, n, __ATOMIC_SEQ_CST);
    if (n > 0 && at + n <= room)
        memcpy(trap->log + at, line, n);
}

static void die(void) { kill(getpid(), SIGKILL); }

static void cut_power(void)
{
    int how = trap->number, fd = open(trap->mount, O_RDONLY | O_CLOEXEC);
    trap->armed = 0;
    if (fd < 0 || ioctl(fd, SHUTDOWN, &how))
        trap->hit = -errno;
    kill(0, SIGKILL);
}

static void slow(void)
{
    struct timespec left = {trap->slow_ms / 1000, trap->slow_ms % 1000 * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* Waits until whoever watches has done something. */
static void hold(void)
{
    struct timespec soon = {0, 200000};
    __atomic_store_n(&trap->held, getpid(), __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&trap->held, __ATOMIC_SEQ_CST))
        nanosleep(&soon, NULL);
}

/* Returns what is asked for of this call: NOTHING, or what only the call itself can do (HALF, FAIL, SHORT, SKIP, DENY). */
static int reached(const char *call)
{
    if (!trap || !trap->armed || (trap->ours && trap->ours != getpid()))
        return NOTHING;
    if (trap->only[0] && strcmp(trap->only, call))
        return NOTHING;
    int64_t count = __atomic_add_fetch(&trap->count, 1, __ATOMIC_SEQ_CST);
    if (trap->skip && count == trap->skip)
        return SKIP;
    if (count < trap->at || trap->at == 0 || count > (trap->until ? trap->until : trap->at))
        return NOTHING;
    trap->hit++;
    switch (trap->action) {
    case KILL: die(); break;
    case KILL_ALL: kill(0, SIGKILL); break;
    case KILL_PARENT: kill(getppid(), SIGKILL); slow(); return NOTHING;
    case POWER: cut_power(); break;
    case RAISE: kill(0, trap->number); slow(); return NOTHING;
    case STOP: kill(getpid(), SIGSTOP); return NOTHING;
    case HOLD: hold(); return NOTHING;
    }
    return trap->action;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int failed(int code)
{
    errno = code;
    return -1;
}

/* For calls that take names or descriptors: COUNTED(name for the log, first path, second path, numbers, the call). */
#define COUNTED(call, a, b, x, y, expression) \
    do { \
        int asked = reached(call); \
        if (asked == FAIL) \
            return failed(trap->number); \
        if (asked == HALF) \
            die(); \
        int result = asked == SKIP ? 0 : (expression), code = errno; \
        if (asked == DENY) \
            result = failed(code = trap->number); \
        if (trap && trap->armed) \
            note(call, a, b, x, y, result < 0 ? -code : result); \
        errno = code; \
        return result; \
    } while (0)

static int watched(const char *path)
{
    return trap && trap->armed && trap->under[0] && !strncmp(path, trap->under, strlen(trap->under));
}

/* For calls that only look or read: WATCHED(name for the log, path, type, what says that it failed, the call). */
#define WATCHED(call, path, type, bad, expression) \
    do { \
        const char *looked = trap && trap->armed && trap->under[0] ? (path) : ""; \
        int asked = watched(looked) ? reached(call) : NOTHING; \
        (void)asked; \
        if (!watched(looked)) \
            return expression; \
        if (asked == FAIL) { \
            errno = trap->number; \
            return bad; \
        } \
        type result = expression; \
        int code = errno; \
        note(call, looked, "", 0, 0, result == bad ? -code : 0); \
        errno = code; \
        return result; \
    } while (0)

static int changes(int flags) { return flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR); }

static int opened(int (*real)(int, const char *, int, ...), int dir, const char *path, int flags, mode_t mode)
{
    char name[2 * PATH_MAX];
    if (!changes(flags))
        WATCHED("open-read", full(dir, path, name), int, -1, real(dir, path, flags));
    if (!trap || !trap->armed || !strcmp(path, "/dev/null"))
        return real(dir, path, flags, mode);
    COUNTED((flags & O_TMPFILE) == O_TMPFILE ? "tmpfile" : "open", full(dir, path, name), "", flags & O_CREAT, flags & O_EXCL,
            real(dir, path, flags, mode));
}

#define MODE \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = changes(flags) ? va_arg(list, mode_t) : 0; \
    va_end(list)

typedef int (*open_at)(int, const char *, int, ...);

int openat(int dir, const char *path, int flags, ...)
{
    MODE;
    static open_at real;
    return opened(real ? real : (real = (open_at)dlsym(RTLD_NEXT, "openat")), dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...)
{
    MODE;
    static open_at real;
    return opened(real ? real : (real = (open_at)dlsym(RTLD_NEXT, "openat64")), dir, path, flags, mode);
}
int open(const char *path, int flags, ...)
{
    MODE;
    return openat(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    MODE;
    return openat64(AT_FDCWD, path, flags, mode);
}

static int regular(int fd)
{
    struct stat status;
    return trap && trap->armed && !fstat(fd, &status) && S_ISREG(status.st_mode) && fd > 2;
}

static int begins(const void *data, size_t nbytes, off_t offset)
{
    static const char zero[8];
    return offset == 0 && nbytes >= 8 && memcmp(data, zero, 8) != 0;
}

typedef ssize_t (*write_at)(int, const void *, size_t, off_t);

static ssize_t written(write_at real, int fd, const void *data, size_t nbytes, off_t offset)
{
    char name[PATH_MAX];
    if (!regular(fd))
        return real(fd, data, nbytes, offset);
    int asked = reached("pwrite");
    if (asked == FAIL)
        return failed(trap->number);
    ssize_t done = real(fd, data, asked == HALF || asked == SHORT ? nbytes / 2 : nbytes, offset);
    if (asked == HALF)
        die();
    int code = errno;
    note("pwrite", name_of(fd, name), begins(data, nbytes, offset) ? "begins" : "", offset, done, done < 0 ? -code : 0);
    errno = code;
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t nbytes, off_t offset)
{
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return written(real, fd, data, nbytes, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t nbytes, off_t offset)
{
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    return written(real, fd, data, nbytes, offset);
}
ssize_t write(int fd, const void *data, size_t nbytes)
{
    char name[PATH_MAX];
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!regular(fd))
        return real(fd, data, nbytes);
    COUNTED("write", name_of(fd, name), "", lseek(fd, 0, SEEK_CUR), nbytes,
            real(fd, data, asked == SHORT ? (nbytes + 1) / 2 : nbytes));
}

#define SYNC(call, ...) \
    char name[PATH_MAX]; \
    COUNTED(call, name_of(fd, name), "", 0, 0, __VA_ARGS__)

int fsync(int fd)
{
    REAL(int, "fsync", int);
    SYNC("fsync", real(fd));
}
int fdatasync(int fd)
{
    REAL(int, "fdatasync", int);
    SYNC("fsync", real(fd));
}
int sync_file_range(int fd, off64_t offset, off64_t nbytes, unsigned flags)
{
    char name[PATH_MAX];
    REAL(int, "sync_file_range", int, off64_t, off64_t, unsigned);
    COUNTED("sync_file_range", name_of(fd, name), "", offset, nbytes, real(fd, offset, nbytes, flags));
}

static int cut(int (*real)(int, off_t), int fd, off_t size)
{
    char name[PATH_MAX];
    COUNTED("ftruncate", name_of(fd, name), "", size, 0, real(fd, size));
}
int ftruncate(int fd, off_t size)
{
    REAL(int, "ftruncate", int, off_t);
    return cut(real, fd, size);
}
int ftruncate64(int fd, off_t size)
{
    REAL(int, "ftruncate64", int, off_t);
    return cut(real, fd, size);
}

int renameat2(int from, const char *a, int to, const char *b, unsigned flags)
{
    char one[2 * PATH_MAX], other[2 * PATH_MAX];
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    if (trap && trap->armed && trap->no_exchange)
        return failed(trap->no_exchange);
    COUNTED(flags & RENAME_EXCHANGE ? "exchange" : "rename", full(from, a, one), full(to, b, other), 0, 0,
            real(from, a, to, b, flags));
}
int renameat(int from, const char *a, int to, const char *b)
{
    char one[2 * PATH_MAX], other[2 * PATH_MAX];
    REAL(int, "renameat", int, const char *, int, const char *);
    COUNTED("rename", full(from, a, one), full(to, b, other), 0, 0, real(from, a, to, b));
}
int rename(const char *a, const char *b) { return renameat(AT_FDCWD, a, AT_FDCWD, b); }

int mkdirat(int dir, const char *path, mode_t mode)
{
    char name[2 * PATH_MAX];
    REAL(int, "mkdirat", int, const char *, mode_t);
    COUNTED("mkdir", full(dir, path, name), "", 0, 0, real(dir, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dir, const char *path, int flags)
{
    char name[2 * PATH_MAX];
    REAL(int, "unlinkat", int, const char *, int);
    COUNTED(flags & AT_REMOVEDIR ? "rmdir" : "unlink", full(dir, path, name), "", 0, 0, real(dir, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int linkat(int from, const char *a, int to, const char *b, int flags)
{
    char one[2 * PATH_MAX], other[2 * PATH_MAX];
    REAL(int, "linkat", int, const char *, int, const char *, int);
    COUNTED("link", full(from, a, one), full(to, b, other), 0, 0, real(from, a, to, b, flags));
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }

int chmod(const char *path, mode_t mode)
{
    char name[2 * PATH_MAX];
    REAL(int, "chmod", const char *, mode_t);
    COUNTED("chmod", full(AT_FDCWD, path, name), "", mode, 0, real(path, mode));
}
int fchmodat(int dir, const char *path, mode_t mode, int flags)
{
    char name[2 * PATH_MAX];
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    COUNTED("chmod", full(dir, path, name), "", mode, 0, real(dir, path, mode, flags));
}
int chown(const char *path, uid_t user, gid_t group)
{
    char name[2 * PATH_MAX];
    REAL(int, "chown", const char *, uid_t, gid_t);
    COUNTED("chown", full(AT_FDCWD, path, name), "", user, group, real(path, user, group));
}
int utimensat(int dir, const char *path, const struct timespec times[2], int flags)
{
    char name[2 * PATH_MAX];
    REAL(int, "utimensat", int, const char *, const struct timespec *, int);
    COUNTED("utimens", full(dir, path, name), "", 0, 0, real(dir, path, times, flags));
}
int setxattr(const char *path, const char *key, const void *value, size_t nbytes, int flags)
{
    char name[2 * PATH_MAX];
    REAL(int, "setxattr", const char *, const char *, const void *, size_t, int);
    COUNTED("setxattr", full(AT_FDCWD, path, name), key, 0, 0, real(path, key, value, nbytes, flags));
}

int ioctl(int fd, unsigned long request, ...)
{
    char name[PATH_MAX];
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    REAL(int, "ioctl", int, unsigned long, ...);
    if (request != FICLONE && request != FICLONERANGE)
        return real(fd, request, argument);
    COUNTED("ioctl", name_of(fd, name), "", 0, 0, real(fd, request, argument));
}

/* What only looks or reads. glibc 2.33 and later have the calls of the stat family under these names. */

int stat64(const char *path, struct stat64 *into)
{
    char name[2 * PATH_MAX];
    REAL(int, "stat64", const char *, struct stat64 *);
    WATCHED("stat", full(AT_FDCWD, path, name), int, -1, real(path, into));
}
int lstat64(const char *path, struct stat64 *into)
{
    char name[2 * PATH_MAX];
    REAL(int, "lstat64", const char *, struct stat64 *);
    WATCHED("stat", full(AT_FDCWD, path, name), int, -1, real(path, into));
}
int fstatat64(int dir, const char *path, struct stat64 *into, int flags)
{
    char name[2 * PATH_MAX];
    REAL(int, "fstatat64", int, const char *, struct stat64 *, int);
    WATCHED("stat", full(dir, path, name), int, -1, real(dir, path, into, flags));
}
int fstat64(int fd, struct stat64 *into)
{
    char name[PATH_MAX];
    REAL(int, "fstat64", int, struct stat64 *);
    WATCHED("fstat", name_of(fd, name), int, -1, real(fd, into));
}
int access(const char *path, int mode)
{
    char name[2 * PATH_MAX];
    REAL(int, "access", const char *, int);
    WATCHED("access", full(AT_FDCWD, path, name), int, -1, real(path, mode));
}
int statvfs64(const char *path, struct statvfs64 *into)
{
    char name[2 * PATH_MAX];
    REAL(int, "statvfs64", const char *, struct statvfs64 *);
    WATCHED("statvfs", full(AT_FDCWD, path, name), int, -1, real(path, into));
}
DIR *opendir(const char *path)
{
    char name[2 * PATH_MAX];
    REAL(DIR *, "opendir", const char *);
    WATCHED("opendir", full(AT_FDCWD, path, name), DIR *, NULL, real(path));
}
DIR *fdopendir(int fd)
{
    char name[PATH_MAX];
    REAL(DIR *, "fdopendir", int);
    WATCHED("opendir", name_of(fd, name), DIR *, NULL, real(fd));
}
struct dirent64 *readdir64(DIR *folder)
{
    char name[PATH_MAX];
    REAL(struct dirent64 *, "readdir64", DIR *);
    errno = 0; /* the end of a directory is no error, and is not noted as one */
    WATCHED("readdir", name_of(dirfd(folder), name), struct dirent64 *, NULL, real(folder));
}
ssize_t readlink(const char *path, char *into, size_t nbytes)
{
    char name[2 * PATH_MAX];
    REAL(ssize_t, "readlink", const char *, char *, size_t);
    WATCHED("readlink", path[0] == '/' ? path : full(AT_FDCWD, path, name), ssize_t, -1, real(path, into, nbytes));
}
/* Of a read that is cut short: half of it, and never nothing, which would be the end of the file. */
static size_t some(size_t nbytes, int asked) { return asked == SHORT ? (nbytes + 1) / 2 : nbytes; }

ssize_t read(int fd, void *into, size_t nbytes)
{
    char name[PATH_MAX];
    REAL(ssize_t, "read", int, void *, size_t);
    WATCHED("read", name_of(fd, name), ssize_t, -1, real(fd, into, some(nbytes, asked)));
}
ssize_t pread64(int fd, void *into, size_t nbytes, off64_t offset)
{
    char name[PATH_MAX];
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    WATCHED("pread", name_of(fd, name), ssize_t, -1, real(fd, into, some(nbytes, asked), offset));
}
ssize_t preadv64v2(int fd, const struct iovec *into, int count, off64_t offset, int flags)
{
    char name[PATH_MAX];
    struct iovec first = *into;
    REAL(ssize_t, "preadv64v2", int, const struct iovec *, int, off64_t, int);
    WATCHED("pread", name_of(fd, name), ssize_t, -1,
            asked == SHORT ? (first.iov_len = some(first.iov_len, asked), real(fd, &first, 1, offset, flags))
                           : real(fd, into, count, offset, flags));
}
void *mmap64(void *at, size_t nbytes, int protection, int flags, int fd, off64_t offset)
{
    char name[PATH_MAX];
    REAL(void *, "mmap64", void *, size_t, int, int, int, off64_t);
    if (fd < 0)
        return real(at, nbytes, protection, flags, fd, offset);
    WATCHED("mmap", name_of(fd, name), void *, MAP_FAILED, real(at, nbytes, protection, flags, fd, offset));
}
/* A map that is populated counts before and after: what becomes of the file in between the kernel reports as an error,
 * and what becomes of it afterwards as SIGBUS. */
int madvise(void *at, size_t nbytes, int advice)
{
    REAL(int, "madvise", void *, size_t, int);
    if (advice != MADV_POPULATE_READ || !trap || !trap->armed || !trap->under[0])
        return real(at, nbytes, advice);
    int asked = reached("populate"), result = asked == FAIL ? failed(trap->number) : real(at, nbytes, advice), code = errno;
    note("populate", "", "", 0, 0, result < 0 ? -code : 0);
    reached("populated");
    note("populated", "", "", 0, 0, 0);
    errno = code;
    return result;
}
int posix_fadvise64(int fd, off64_t offset, off64_t nbytes, int advice)
{
    char name[PATH_MAX];
    REAL(int, "posix_fadvise64", int, off64_t, off64_t, int);
    if (watched(name_of(fd, name)) && reached("fadvise") == FAIL)
        return trap->number; /* it returns its errors */
    return real(fd, offset, nbytes, advice);
}
/* A descriptor is closed whatever the call says (close(2)). */
int close(int fd)
{
    char name[PATH_MAX];
    REAL(int, "close", int);
    if (!watched(trap && trap->armed && trap->under[0] ? name_of(fd, name) : ""))
        return real(fd);
    int failing = reached("close") == FAIL, result = real(fd);
    note("close", name, "", 0, 0, result);
    return failing ? failed(trap->number) : result;
}
