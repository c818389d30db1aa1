// What a CPU owes to an operating system and its programs, seen from user space of Linux: every line that this prints
// is a fact of the architecture, and the same on every machine: a real CPU, KVM, an emulator.
//
//     gcc -O1 -static -o conformance conformance.c && ./conformance
//
// A line is "name: facts"; the facts are numbers that the program took from signals, registers and memory, never
// addresses that differ between runs. The last line is "done". Runs as root, where it also tries the I/O ports.
//
// Source: AMD APM volume 2, chapter 8 (exceptions), volume 3 (instructions); Linux signal(7), ptrace(2).

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096
#define PRESENT_BIT 1
typedef unsigned char byte;

// -- faults ------------------------------------------------------------------------------------------------------------

static sigjmp_buf escape;
static struct {
    int signal, code;
    uint64_t vector, error, address, cr2, rip, flags, rax, rcx, rsi, rdi;
} seen;

static void note(int number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    seen.signal = number;
    seen.code = info->si_code;
    seen.vector = regs[REG_TRAPNO];
    seen.error = regs[REG_ERR];
    seen.address = (uint64_t)info->si_addr;
    seen.cr2 = regs[REG_CR2];
    seen.rip = regs[REG_RIP];
    seen.flags = regs[REG_EFL];
    seen.rax = regs[REG_RAX];
    seen.rcx = regs[REG_RCX];
    seen.rsi = regs[REG_RSI];
    seen.rdi = regs[REG_RDI];
    siglongjmp(escape, 1);
}

static void catch_all(void (*handler)(int, siginfo_t *, void *)) {
    static byte alternate[64 << 10];
    stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
    sigaltstack(&stack, NULL);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
}

static byte *map(size_t pages, int protection) {
    byte *at = mmap(NULL, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return at;
}

// Two pages of which the second is taken away again: whatever crosses the boundary faults at its first byte.
static byte *map_with_a_hole(int protection) {
    byte *at = map(2, protection);
    munmap(at + PAGE, PAGE);
    return at;
}

static byte *code_of(const void *bytes, size_t size) {
    byte *code = map(1, PROT_READ | PROT_WRITE | PROT_EXEC);
    memcpy(code, bytes, size);
    return code;
}

// Print what the fault was; ADDRESS and RIP as distances from what they are expected near.
static void tell_fault(const char *name, const void *near_address, const void *near_rip) {
    printf("%s: signal %d code %d vector %lu error %#lx", name, seen.signal, seen.code, seen.vector, seen.error);
    if (near_address)
        printf(" address %+ld cr2 %+ld", (long)(seen.address - (uint64_t)near_address),
               (long)(seen.cr2 - (uint64_t)near_address));
    if (near_rip)
        printf(" rip %+ld", (long)(seen.rip - (uint64_t)near_rip));
    putchar('\n');
}

#define FAULT(name, near, statement)                                                                                   \
    do {                                                                                                               \
        if (!sigsetjmp(escape, 1)) {                                                                                   \
            statement;                                                                                                 \
            printf("%s: nothing\n", name);                                                                             \
        } else                                                                                                         \
            tell_fault(name, near, NULL);                                                                              \
    } while (0)

// Run machine code; if it faults tell where in it.
#define CODE(name, ...)                                                                                                \
    do {                                                                                                               \
        static const byte bytes[] = {__VA_ARGS__};                                                                     \
        byte *code = code_of(bytes, sizeof bytes);                                                                     \
        if (!sigsetjmp(escape, 1)) {                                                                                   \
            ((void (*)(void))code)();                                                                                  \
            printf("%s: nothing\n", name);                                                                             \
        } else                                                                                                         \
            tell_fault(name, NULL, code);                                                                              \
        munmap(code, PAGE);                                                                                            \
    } while (0)

static void page_faults(void) {
    byte *hole = map(2, PROT_READ | PROT_WRITE), *fixed = map(1, PROT_READ), *none = map(1, PROT_NONE);
    byte *data = map(1, PROT_READ | PROT_WRITE), *edge = map_with_a_hole(PROT_READ | PROT_WRITE);
    byte *code = map_with_a_hole(PROT_READ | PROT_WRITE | PROT_EXEC);
    volatile byte sink;
    munmap(hole + PAGE, PAGE);
    hole += PAGE;
    FAULT("read of nothing", hole + 123, sink = *(volatile byte *)(hole + 123));
    FAULT("write to nothing", hole + 77, *(volatile byte *)(hole + 77) = 1);
    FAULT("read-modify-write of nothing", hole + 8, __atomic_fetch_add((uint64_t *)(hole + 8), 1, __ATOMIC_SEQ_CST));
    FAULT("write to what is read-only", fixed + 5, *(volatile byte *)(fixed + 5) = 1);
    sink = *(volatile byte *)fixed;
    FAULT("write to a zero page", fixed + 6, *(volatile byte *)(fixed + 6) = 1);
    FAULT("read of what is forbidden", none + 9, sink = *(volatile byte *)(none + 9));
    data[0] = 0xC3;
    FAULT("execution of data", data, ((void (*)(void))data)());
    FAULT("execution of nothing", hole + 16, ((void (*)(void))(hole + 16))());
    FAULT("read across an edge", edge + PAGE, sink = *(volatile uint64_t *)(edge + PAGE - 3));
    FAULT("write across an edge", edge + PAGE, *(volatile uint64_t *)(edge + PAGE - 3) = ~0ul);
    printf("a write that faulted left: %d %d %d\n", edge[PAGE - 3], edge[PAGE - 2], edge[PAGE - 1]);
    FAULT("16 bytes across an edge", edge + PAGE,
          asm volatile("movups %%xmm0, %0" : : "m"(*(edge + PAGE - 8)) : "memory"));
    code[PAGE - 1] = 0x90;  // NOP, and the next instruction is not there
    FAULT("running off an edge", code + PAGE, ((void (*)(void))(code + PAGE - 1))());
    code[PAGE - 2] = 0x48, code[PAGE - 1] = 0x89;  // the first two bytes of a MOV
    FAULT("an instruction across an edge", code + PAGE, ((void (*)(void))(code + PAGE - 2))());
    if (sigsetjmp(escape, 1))
        tell_fault("kernel space", (void *)0xFFFFFFFF80000000, NULL);
    else
        sink = *(volatile byte *)0xFFFFFFFF80000000;
    FAULT("address that is none, by rax", NULL, asm volatile("movb (%0), %%al" : : "r"(1ul << 47) : "rax"));
    FAULT("address that is none, by rbp", NULL,
          asm volatile("push %%rbp\n mov %0, %%rbp\n movb (%%rbp), %%al\n pop %%rbp" : : "r"(1ul << 47) : "rax"));
    (void)sink;
}

static void exceptions(void) {
    CODE("divide by zero", 0x31, 0xC9, 0x31, 0xD2, 0xB8, 1, 0, 0, 0, 0xF7, 0xF1, 0xC3);
    CODE("divide overflow", 0xB8, 0, 0, 0, 0x80, 0x99, 0xB9, 0xFF, 0xFF, 0xFF, 0xFF, 0xF7, 0xF9, 0xC3);
    CODE("int3", 0x90, 0xCC, 0xC3);
    CODE("int 3 in two bytes", 0x90, 0xCD, 3, 0xC3);
    CODE("int 4", 0xCD, 4, 0xC3);
    CODE("int 1", 0xF1, 0xC3);
    CODE("ud2", 0x90, 0x0F, 0x0B, 0xC3);
    CODE("an instruction of 32-bit mode", 0x06, 0xC3);
    CODE("a prefix too many", 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
         0x90, 0xC3);
    CODE("lock of a register", 0xF0, 0x01, 0xC0, 0xC3);
    CODE("hlt", 0x90, 0xF4, 0xC3);
    CODE("cli", 0xFA, 0xC3);
    CODE("sti", 0xFB, 0xC3);
    CODE("in", 0xE4, 0x60, 0xC3);
    CODE("out", 0xE6, 0x80, 0xC3);
    CODE("int 0x20", 0xCD, 0x20, 0xC3);
    CODE("int 0xe", 0xCD, 0x0E, 0xC3);
    CODE("read cr0", 0x0F, 0x20, 0xC0, 0xC3);
    CODE("write cr3", 0x0F, 0x22, 0xD8, 0xC3);
    CODE("read dr7", 0x0F, 0x21, 0xF8, 0xC3);
    CODE("rdmsr", 0x0F, 0x32, 0xC3);
    CODE("wrmsr", 0x0F, 0x30, 0xC3);
    CODE("invlpg", 0x0F, 0x01, 0x38, 0xC3);
    CODE("lgdt", 0x0F, 0x01, 0x17, 0xC3);
    CODE("clts", 0x0F, 0x06, 0xC3);
    CODE("swapgs", 0x0F, 0x01, 0xF8, 0xC3);
    CODE("sysret", 0x48, 0x0F, 0x07, 0xC3);
    CODE("wbinvd", 0x0F, 0x09, 0xC3);
    CODE("a selector beyond the table", 0xB8, 0xFB, 0xFF, 0, 0, 0x8E, 0xD8, 0xC3);
    CODE("a selector of the kernel", 0xB8, 0x18, 0, 0, 0, 0x8E, 0xD8, 0xC3);
    CODE("a selector that is null", 0x31, 0xC0, 0x8E, 0xD8, 0xC3);
    CODE("a null stack segment", 0x31, 0xC0, 0x8E, 0xD0, 0xC3);
    CODE("iretq to the kernel", 0x31, 0xC0, 0x50, 0x54, 0x9C, 0x6A, 0x10, 0x50, 0x48, 0xCF, 0xC3);
    CODE("x87, unmasked", 0xD9, 0xE8, 0xD9, 0xEE, 0x6A, 0, 0xC7, 0x04, 0x24, 0x7B, 3, 0, 0, 0xD9, 0x2C, 0x24, 0x58,
         0xDE, 0xF9, 0x9B, 0xDB, 0xE3, 0xC3);
    asm volatile("fninit");
}

// -- instructions that can be interrupted ------------------------------------------------------------------------------

static byte *mended;

static void mend(int number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    seen.signal = number;
    seen.error = regs[REG_ERR];
    seen.address = (uint64_t)info->si_addr;
    seen.rcx = regs[REG_RCX];
    seen.rsi = regs[REG_RSI];
    seen.rdi = regs[REG_RDI];
    mprotect(mended, PAGE, PROT_READ | PROT_WRITE);
}

static void strings(void) {
    byte *from = map(2, PROT_READ | PROT_WRITE), *to = map(2, PROT_READ | PROT_WRITE);
    for (int i = 0; i < 2 * PAGE; i++)
        from[i] = i * 7 + (i >> 8);
    catch_all(mend);
    for (int way = 0; way < 4; way++) {
        int backwards = way >> 1, size = way & 1 ? 8 : 1;
        long count = 5000 / size, first = backwards ? 5000 - size : 0;
        memset(to, 0, 2 * PAGE);
        mended = to + (backwards ? 0 : PAGE);
        mprotect(mended, PAGE, PROT_READ);
        void *source = from + first, *target = to + first;
        if (backwards)
            asm volatile("std");
        if (size == 1)
            asm volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
        else
            asm volatile("rep movsq" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
        asm volatile("cld");
        printf("rep movs of %d, %s: error %#lx at %+ld, rcx %lu rsi %+ld rdi %+ld; same %d\n", size,
               backwards ? "down" : "up", seen.error, (long)(seen.address - (uint64_t)to), seen.rcx,
               (long)(seen.rsi - (uint64_t)from), (long)(seen.rdi - (uint64_t)to), !memcmp(from, to, 5000));
    }
    long count = 2 * PAGE;
    void *target = to;
    mended = to + PAGE;
    mprotect(mended, PAGE, PROT_NONE);
    asm volatile("rep stosb" : "+D"(target), "+c"(count) : "a"(0x5A) : "memory");
    printf("rep stosb: error %#lx rcx %lu; last %#x\n", seen.error, seen.rcx, to[2 * PAGE - 1]);
    mprotect(mended, PAGE, PROT_NONE);
    count = 2 * PAGE;
    target = to;
    asm volatile("repe scasb" : "+D"(target), "+c"(count) : "a"(0x5A) : "memory", "cc");
    printf("repe scasb: error %#lx rcx %lu; left %ld\n", seen.error, seen.rcx, count);
    catch_all(note);
}

// -- code that changes -------------------------------------------------------------------------------------------------

static void changing_code(void) {
    byte *code = map(1, PROT_READ | PROT_WRITE | PROT_EXEC);
    uint64_t sum = 0;
    memcpy(code, (byte[]){0xB8, 0, 0, 0, 0, 0xC3}, 6);  // mov eax, n; ret
    for (int i = 0; i < 5000; i++) {
        *(volatile int *)(code + 1) = i;
        sum += ((int (*)(void))code)();
    }
    printf("code that is written before each call: %lu\n", sum);
    // It changes an instruction behind itself: mov byte [rip+4], 1 over the immediate of the mov that follows.
    static const byte itself[] = {0xC6, 0x05, 1, 0, 0, 0, 42, 0xB8, 7, 0, 0, 0, 0xC3};
    memcpy(code, itself, sizeof itself);
    printf("code that changes what comes next: %d\n", ((int (*)(void))code)());
    byte *there = mremap(code, PAGE, 2 * PAGE, MREMAP_MAYMOVE);
    memcpy(there, (byte[]){0xB8, 1, 0, 0, 0, 0xC3}, 6);
    int before = ((int (*)(void))there)();
    byte *other = map(1, PROT_READ | PROT_WRITE | PROT_EXEC);
    memcpy(other, (byte[]){0xB8, 2, 0, 0, 0, 0xC3}, 6);
    mremap(other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there);
    printf("other code at the same address: %d then %d\n", before, ((int (*)(void))there)());
}

// Code that is written through one mapping and run through another, as just-in-time compilers do: many stores, of which
// each changes where instructions begin.
static void code_by_another_name(void) {
    int file = memfd_create("code", 0), wrong = 0;
    if (file < 0 || ftruncate(file, PAGE))
        exit(2);
    byte *written = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    byte *run = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, file, 0);
    for (int i = 0; i < 2000; i++) {
        int at = 0, nops = i * 7 % 300;
        for (int n = 0; n < nops; n++) {
            ((volatile byte *)written)[at++] = 0x48;  // with a NOP: 48 90; and so a MOV that moves from turn to turn
            ((volatile byte *)written)[at++] = 0x90;
        }
        memcpy(written + at, (byte[]){0xB8, i, i >> 8, 0, 0, 0xC3}, 6);
        unsigned a = 0, c = 0;
        asm volatile("cpuid" : "+a"(a), "+c"(c) : : "rbx", "rdx", "memory");
        wrong += ((int (*)(void))run)() != i;
    }
    printf("code that is written by another name, stale: %d of 2000\n", wrong);
}

// -- translations that change ------------------------------------------------------------------------------------------

static volatile int stop_touching;
static byte *touched;

static void *toucher(void *unused) {
    uint64_t sum = 0;
    (void)unused;
    while (!stop_touching)
        sum += *(volatile byte *)touched;
    return (void *)(sum & 1);
}

static void translations(void) {
    byte *at = map(1, PROT_READ | PROT_WRITE);
    int stale = 0;
    for (int i = 0; i < 3000; i++) {
        byte *fresh = map(1, PROT_READ | PROT_WRITE);
        *(volatile int *)fresh = i;
        mremap(fresh, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
        stale += *(volatile int *)at != i;
    }
    printf("another page at the same address, stale: %d of 3000\n", stale);
    stale = 0;
    for (int i = 0; i < 3000; i++) {
        *(volatile int *)at = i + 1;
        madvise(at, PAGE, MADV_DONTNEED);
        stale += *(volatile int *)at != 0;
    }
    printf("a page given back reads as zero, stale: %d of 3000\n", stale);
    stale = 0;
    for (int i = 0; i < 1000; i++) {
        mprotect(at, PAGE, PROT_READ);
        if (!sigsetjmp(escape, 1)) {
            *(volatile byte *)at = 1;
            stale++;
        }
        mprotect(at, PAGE, PROT_READ | PROT_WRITE);
        *(volatile byte *)at = 2;
    }
    printf("writes that a read-only page let through: %d of 1000\n", stale);
    touched = at;
    pthread_t thread;
    pthread_create(&thread, NULL, toucher, NULL);
    for (int i = 0; i < 300; i++) {
        byte *fresh = map(1, PROT_READ | PROT_WRITE);
        *fresh = i;
        mremap(fresh, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
    }
    stop_touching = 1;
    pthread_join(thread, NULL);
    printf("pages exchanged under another thread: %d\n", *at);
    int pipes[2];
    if (pipe(pipes))
        exit(2);
    byte *shared = map(64, PROT_READ | PROT_WRITE);
    memset(shared, 1, 64 * PAGE);
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            for (int page = 0; page < 64; page++)
                shared[page * PAGE] = 100 + i;
            _exit(shared[63 * PAGE] == 100 + i ? 0 : 1);
        }
        int status;
        waitpid(child, &status, 0);
        if (status)
            printf("a child failed: %#x\n", status);
    }
    int changed = 0;
    for (int page = 0; page < 64; page++)
        changed += shared[page * PAGE] != 1;
    printf("pages that a child changed in its parent: %d\n", changed);
}

// -- single steps and breakpoints --------------------------------------------------------------------------------------

static volatile int steps;
static uint64_t step_sum;
static byte *step_code;

static void step(int number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    steps++;
    step_sum = step_sum * 31 + (uint64_t)regs[REG_RIP] - (uint64_t)step_code;
    if (regs[REG_RIP] < (greg_t)step_code || regs[REG_RIP] >= (greg_t)step_code + PAGE)
        regs[REG_EFL] &= ~0x100ul;
    (void)number, (void)info;
}

static void single_steps(void) {
    // push flags with TF; popf; nop; mov ecx, 3; rep lodsb; mov eax, getpid; syscall; cpuid; nop; ret
    static const byte code[] = {0x9C, 0x81, 0x0C, 0x24, 0,    1,    0,    0,    0x9D, 0x90, 0xB9, 3, 0,
                                0,    0,    0xF3, 0xAC, 0xB8, 0x27, 0,    0,    0,    0x0F, 0x05, 0x31,
                                0xC0, 0x53, 0x0F, 0xA2, 0x5B, 0x90, 0xC3};
    byte bytes[8] = {0};
    struct sigaction action = {.sa_sigaction = step, .sa_flags = SA_SIGINFO};
    sigaction(SIGTRAP, &action, NULL);
    step_code = code_of(code, sizeof code);
    void *from = bytes;
    asm volatile("call *%1" : "+S"(from) : "r"(step_code) : "rax", "rcx", "rdx", "r11", "memory", "cc");
    for (int i = 0; i < 10 && steps == 0; i++) {
    }
    printf("single steps: more than %d\n", steps >= 11 ? 10 : steps);
    printf("bytes loaded under single steps: %ld\n", (long)((byte *)from - bytes));
    catch_all(note);
}

static uint64_t watched;

static void traced(void) {
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        for (int i = 0; i < 3; i++)
            ((volatile uint64_t *)&watched)[0] = i;
        _exit(7);
    }
    int status, hits = 0;
    waitpid(child, &status, 0);
    long failed = ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[0]), &watched);
    failed |= ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 1 | 1 << 16 | 2 << 18);
    ptrace(PTRACE_CONT, child, 0, 0);
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
        hits += WSTOPSIG(status) == SIGTRAP;
        ptrace(PTRACE_CONT, child, 0, 0);
    }
    printf("watchpoint: failed %ld, hits %d, exit %d\n", failed, hits, WEXITSTATUS(status));
    child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        asm volatile("nop\n nop\n nop\n nop");
        _exit(5);
    }
    waitpid(child, &status, 0);
    int count = 0;
    while (WIFSTOPPED(status) && count < 200) {
        count++;
        ptrace(count < 200 ? PTRACE_SINGLESTEP : PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
    }
    if (WIFSTOPPED(status)) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
    }
    printf("stepped by ptrace: at least %d, exit %d\n", count >= 10 ? 10 : count, WEXITSTATUS(status));
}

// -- ways into the kernel ----------------------------------------------------------------------------------------------

static void system_calls(void) {
    long by_int80, by_syscall, rcx = 0, r11 = 0;
    asm volatile("int $0x80" : "=a"(by_int80) : "a"(20) : "memory", "r8", "r9", "r10", "r11");
    asm volatile("syscall" : "=a"(by_syscall), "=c"(rcx), "=r"(r11) : "a"(SYS_getpid) : "memory", "r11");
    printf("getpid by int 0x80 %d, by syscall %d, rcx is an address %d\n", by_int80 == getpid(), by_syscall == getpid(),
           rcx != 0);
    asm volatile("int $0x80" : "=a"(by_int80) : "a"(9999) : "memory");
    asm volatile("syscall" : "=a"(by_syscall) : "a"(9999) : "rcx", "r11", "memory");
    printf("calls that are none: %d %d\n", (int)by_int80, (int)by_syscall);
    // 32-bit code: far call to a segment of compatibility mode and back.
    byte *low = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    byte *stack = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    // 32-bit: mov eax, 20; int 0x80; mov ecx, eax; xor eax, eax; dec eax; (in 64-bit code 48 is a prefix); retf
    static const byte narrow[] = {0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0x89, 0xC1, 0x31, 0xC0, 0x48, 0xCB};
    memcpy(low, narrow, sizeof narrow);
    struct __attribute__((packed)) {
        uint32_t offset;
        uint16_t selector;
    } target = {(uint32_t)(uint64_t)low, 0x23};
    uint64_t eax = 0, ecx = 0, top = (uint64_t)stack + 4 * PAGE - 64;
    // The pointer is in low memory too: rsp is another stack when it is used.
    memcpy(stack, &target, sizeof target);
    asm volatile("mov %%rsp, %%r12\n mov %2, %%rsp\n lcall *(%3)\n mov %%r12, %%rsp"
                 : "=&a"(eax), "=&c"(ecx)
                 : "r"(top), "r"(stack)
                 : "r12", "rdx", "rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r13", "memory", "cc");
    printf("32-bit code: getpid %d, dec eax is %#lx\n", (pid_t)ecx == getpid(), eax & 0xFFFFFFFF);
}

static void ports(void) {
    if (geteuid() || ioperm(0x80, 1, 1)) {
        puts("ports: not tried");
        return;
    }
    asm volatile("outb %%al, $0x80" : : "a"(0));
    FAULT("a port that was not asked for", NULL, asm volatile("outb %%al, $0x81" : : "a"(0)));
    FAULT("a word that reaches beyond", NULL, asm volatile("outw %%ax, $0x80" : : "a"(0)));
    ioperm(0x80, 1, 0);
    FAULT("a port that was given back", NULL, asm volatile("outb %%al, $0x80" : : "a"(0)));
}

// -- numbers -----------------------------------------------------------------------------------------------------------

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash ^= value;
    return hash * 0x100000001B3ul ^ hash >> 29;
}

static uint64_t integers(unsigned rounds) {
    uint64_t hash = 1, a = 0x0123456789ABCDEF, b = 0xFEDCBA9876543210;
    const uint64_t all = 0x8D5;  // CF PF AF ZF SF OF
    for (unsigned i = 0; i < rounds; i++) {
        uint64_t flags, x = a, y = b | 1, high = 0;
#define ALU(text, used, count)                                                                                         \
    asm volatile(text "\n pushfq\n pop %1" : "+r"(x), "=r"(flags) : "r"(y), "c"(count) : "cc");                        \
    hash = mix(mix(hash, x), flags & (used))
        ALU("add %2, %0", all, 0);
        ALU("sub %2, %0", all, 0);
        ALU("stc\n adc %2, %0", all, 0);
        ALU("stc\n sbb %2, %0", all, 0);
        ALU("addb %b2, %b0", all, 0);
        ALU("subw %w2, %w0", all, 0);
        ALU("and %2, %0", all & ~0x10, 0);
        ALU("xorl %k2, %k0", all & ~0x10, 0);
        ALU("inc %0", all & ~1, 0);
        ALU("neg %0", all, 0);
        ALU("shl %%cl, %0", 0x1, 1 + i % 31);
        ALU("sar %%cl, %0", 0x1, 1 + i % 63);
        ALU("rol %%cl, %0", 0x1, 1 + i % 63);
        ALU("stc\n rcr %%cl, %0", 0x1, 1 + i % 63);
        ALU("imul %2, %0", 0x801, 0);
        ALU("bt %%rcx, %0", 0x1, i % 64);
        ALU("bswap %0", 0, 0);
        ALU("bsf %2, %0", 0x40, 0);
        ALU("bsr %2, %0", 0x40, 0);
        ALU("shld %%cl, %2, %0", 0x1, 1 + i % 63);
        asm volatile("mul %2" : "+a"(x), "=d"(high) : "r"(y) : "cc");
        hash = mix(mix(hash, x), high);
        high %= y;
        asm volatile("div %2" : "+a"(x), "+d"(high) : "r"(y) : "cc");
        hash = mix(mix(hash, x), high);
        uint64_t cell = x, swap = y;
        asm volatile("lock cmpxchg %2, %0" : "+m"(cell), "+a"(x) : "r"(y) : "cc", "memory");
        asm volatile("xchg %0, %1" : "+m"(cell), "+r"(swap) : : "memory");
        asm volatile("lock xadd %1, %0" : "+m"(cell), "+r"(swap) : : "cc", "memory");
        hash = mix(mix(mix(hash, cell), swap), x);
        a = hash;
        b = mix(b, i);
    }
    return hash;
}

// Add, multiply, divide, root: exact by IEEE 754 in every rounding mode. (What is not exact differs between CPUs.)
static uint64_t x87(unsigned rounds) {
    uint64_t hash = 2;
    static const int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    for (unsigned i = 0; i < rounds; i++) {
        volatile long double x = 1.0L + i / 3.0L, y = (i % 17 + 1) / 7.0L;
        uint16_t control, wanted;
        asm volatile("fnstcw %0" : "=m"(control));
        wanted = (control & ~0xC00) | modes[i & 3];
        asm volatile("fldcw %0" : : "m"(wanted));
        long double root = x;
        asm volatile("fsqrt" : "+t"(root));
        long double results[] = {x + y, x - y, x * y, x / y, root, x * 1e-4930L * 1e-20L};
        long long whole = (long long)(x * 1e6L);
        asm volatile("fldcw %0" : : "m"(control));
        for (size_t j = 0; j < sizeof results / sizeof *results; j++) {
            uint64_t mantissa;
            uint16_t exponent;
            memcpy(&mantissa, &results[j], 8);
            memcpy(&exponent, (byte *)&results[j] + 8, 2);
            hash = mix(mix(hash, mantissa), exponent);
        }
        hash = mix(hash, whole);
    }
    return hash;
}

static uint64_t sse(unsigned rounds) {
    uint64_t hash = 3;
    for (unsigned i = 0; i < rounds; i++) {
        volatile double x = 1.0 + i / 3.0, y = (i % 17 + 1) / 7.0;
        volatile float f = (float)x * 1e-38f, g = (float)y * 1e-3f;
        unsigned control, wanted;
        asm volatile("stmxcsr %0" : "=m"(control));
        wanted = (control & ~0x6000u) | (i & 3) << 13;
        asm volatile("ldmxcsr %0" : : "m"(wanted));
        double root;
        asm volatile("sqrtsd %1, %0" : "=x"(root) : "x"(x));
        double results[] = {x + y, x - y, x * y, x / y, root, x * 1e-300 * 1e-20, (double)(f * g)};
        int whole;
        asm volatile("cvtsd2si %1, %0" : "=r"(whole) : "x"(x));
        asm volatile("ldmxcsr %0" : : "m"(control));
        for (size_t j = 0; j < sizeof results / sizeof *results; j++) {
            uint64_t bits;
            memcpy(&bits, &results[j], 8);
            hash = mix(hash, bits);
        }
        uint64_t lanes[2] = {hash, ~hash}, others[2] = {i * 0x9E3779B97F4A7C15ul, i};
        asm volatile("movups %0, %%xmm0\n movups %1, %%xmm1\n paddd %%xmm1, %%xmm0\n pmuludq %%xmm1, %%xmm0\n"
                     "pshufd $0x1B, %%xmm0, %%xmm0\n punpcklbw %%xmm1, %%xmm0\n psrlq $3, %%xmm0\n pcmpgtb %%xmm0, %%xmm1\n"
                     "pxor %%xmm1, %%xmm0\n movups %%xmm0, %0"
                     : "+m"(lanes)
                     : "m"(others)
                     : "xmm0", "xmm1");
        hash = mix(mix(mix(hash, lanes[0]), lanes[1]), whole);
    }
    return hash;
}

static volatile sig_atomic_t alarms;

static void spoil(int number) {
    alarms++;
    (void)number;
    volatile long double junk = 1.5L;
    asm volatile("fninit\n fldcw %0\n pcmpeqb %%xmm0, %%xmm0\n pcmpeqb %%xmm15, %%xmm15"
                 :
                 : "m"((uint16_t){0x27F})
                 : "xmm0", "xmm15");
    junk *= 3;
}

static void preemption(void) {
    uint64_t expected = mix(mix(integers(3000), x87(3000)), sse(3000));
    int wrong = 0;
    pid_t children[6];
    fflush(stdout);
    for (int i = 0; i < 6; i++) {
        children[i] = fork();
        if (children[i])
            continue;
        struct sigaction action = {.sa_handler = spoil};
        struct itimerval timer = {{0, 3000}, {0, 3000}};
        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &timer, NULL);
        int ok = 1, turns = 0;
        while (turns++ < 3 || alarms < 20)
            ok &= mix(mix(integers(3000), x87(3000)), sse(3000)) == expected;
        _exit(ok ? 0 : 1);
    }
    for (int i = 0; i < 6; i++) {
        int status;
        waitpid(children[i], &status, 0);
        wrong += status != 0;
    }
    printf("six processes under timer signals that computed otherwise: %d\n", wrong);
}

// -- signals, clocks ---------------------------------------------------------------------------------------------------

static volatile int depth, deepest;

static void nest(int number) {
    if (++depth > deepest)
        deepest = depth;
    if (depth < 5)
        raise(number);
    depth--;
}

static void signals(void) {
    struct sigaction action = {.sa_handler = nest, .sa_flags = SA_NODEFER};
    sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR1);
    uint64_t values[2] = {0x1122334455667788, 0x99AABBCCDDEEFF00}, after[2];
    asm volatile("movups %1, %%xmm7\n mov %2, %%eax\n mov %3, %%edi\n mov %4, %%esi\n syscall\n movups %%xmm7, %0"
                 : "=m"(after)
                 : "m"(values), "i"(SYS_kill), "r"(getpid()), "i"(SIGUSR1)
                 : "rax", "rdi", "rsi", "rcx", "r11", "xmm7", "memory");
    printf("signals within signals: %d; xmm7 kept %d\n", deepest, !memcmp(values, after, 16));
}

static uint64_t tsc(void) {
    uint32_t low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static void clocks(void) {
    struct timespec last, now;
    uint64_t last_tsc = tsc();
    int backwards = 0;
    clock_gettime(CLOCK_MONOTONIC, &last);
    for (int i = 0; i < 100000; i++) {
        uint64_t read = tsc();
        clock_gettime(CLOCK_MONOTONIC, &now);
        backwards += read < last_tsc;
        backwards += now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
        last = now;
        last_tsc = read;
    }
    struct timespec nap = {0, 20000000}, before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    nanosleep(&nap, NULL);
    clock_gettime(CLOCK_MONOTONIC, &after);
    long slept_us = (after.tv_sec - before.tv_sec) * 1000000 + (after.tv_nsec - before.tv_nsec) / 1000;
    printf("clocks that ran backwards: %d; a nap of 20 ms was not shorter: %d\n", backwards, slept_us >= 20000);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    catch_all(note);
    page_faults();
    exceptions();
    strings();
    changing_code();
    code_by_another_name();
    translations();
    single_steps();
    traced();
    system_calls();
    ports();
    printf("integers: %#lx\nx87: %#lx\nsse: %#lx\n", integers(2000), x87(2000), sse(2000));
    preemption();
    signals();
    clocks();
    puts("done");
    return 0;
}
