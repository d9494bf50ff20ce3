// What GCC makes kernels call: with -fsanitize=thread before each load and store, with -fsanitize=undefined where something is wrong.
// The libraries that have these functions otherwise are not linked.
#include <cstring>

#include "state.h"

using namespace moss_emulation;

#define BOTH(n)                                                                                      \
    extern "C" void __tsan_read##n(void* p) { watch((char*)p, n, READ, CALLER); }                    \
    extern "C" void __tsan_write##n(void* p) { watch((char*)p, n, WRITE, CALLER); }                  \
    extern "C" void __tsan_unaligned_read##n(void* p) { watch((char*)p, n, READ, CALLER); }          \
    extern "C" void __tsan_unaligned_write##n(void* p) { watch((char*)p, n, WRITE, CALLER); }
BOTH(1) BOTH(2) BOTH(4) BOTH(8) BOTH(16)
extern "C" void __tsan_read_range(void* p, size_t n) { watch((char*)p, n, READ, CALLER); }
extern "C" void __tsan_write_range(void* p, size_t n) { watch((char*)p, n, WRITE, CALLER); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Calls of memcpy and the like in kernels come here (build.py).
#define COPY(name)                                                            \
    extern "C" void* emulation_##name(void* to, const void* from, size_t n) { \
        watch((const char*)from, n, READ, CALLER);                            \
        watch((const char*)to, n, WRITE, CALLER);                             \
        return memmove(to, from, n);                                          \
    }
COPY(memcpy)
COPY(memmove)
extern "C" void* emulation_memset(void* to, int value, size_t n) {
    watch((const char*)to, n, WRITE, CALLER);
    return memset(to, value, n);
}

// What a check of GCC's -fsanitize=undefined says: where, and for each kind what.
struct Location {
    const char* file;
    uint32_t line, column;
};
struct Mismatch {
    Location at;
    const void* type;
    uint8_t log_alignment, kind;
};

static void undefined(const Location& at, const std::string& what) {
    const char* slash = strrchr(at.file, '/');
    std::string text = what + " (" + (slash ? slash + 1 : at.file) + ":" + std::to_string(at.line) + ")";
    if (current) fail("%s", text.c_str());
    host_fails("on the host: %s", text.c_str());
}

extern "C" void __ubsan_handle_type_mismatch_v1(Mismatch* m, size_t p) {
    undefined(m->at, described((void*)p) + " is not aligned to " + std::to_string(1 << m->log_alignment) + " bytes");
}
extern "C" void __ubsan_handle_out_of_bounds(Location* at, size_t i) {
    undefined(*at, "index " + std::to_string((long)i) + " is outside of the array");
}
extern "C" void __ubsan_handle_shift_out_of_bounds(Location* at, size_t, size_t) { undefined(*at, "a shift by too much"); }
#define OVERFLOWS(name) \
    extern "C" void __ubsan_handle_##name##_overflow(Location* at, size_t, size_t) { undefined(*at, "signed overflow"); }
OVERFLOWS(add) OVERFLOWS(sub) OVERFLOWS(mul)
extern "C" void __ubsan_handle_negate_overflow(Location* at, size_t) { undefined(*at, "signed overflow"); }
extern "C" void __ubsan_handle_divrem_overflow(Location* at, size_t, size_t) { undefined(*at, "division by zero"); }
