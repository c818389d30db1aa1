/* The guest ABI for C programs: docs/reference/guest-abi.md. Freestanding, 64-bit, ring 3, no library. */
#ifndef PAGEFERRY_GUEST_H
#define PAGEFERRY_GUEST_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define ABI_VERSION 1
#define INFO_MAGIC 0x3154534555474650 /* "PFGUEST1" */
#define PAGE_SIZE 4096
#define MAX_RAM_REGIONS 4
#define MAX_ARGUMENTS 8

#define CONSOLE_PORT 0x3f8
#define EXIT_PORT 0xf4
#define CLOCK_PORT 0xf0
#define SYNC_PORT 0xec
#define INVALIDATE_PORT 0xe8
#define TIMER_PORT 0xe0
#define RTC_PORT 0x70
#define DMA_MMIO 0xfeb00000

#define STATE_RUNNING 1
#define STATE_ENDED 2

struct ram_region {
    u64 gpa, size_bytes;
};

struct info {
    u64 magic, version, memory_bytes, cpus;
    u64 working_set_gpa, working_set_bytes, rate, seed;
    u64 status_gpa, ram_regions, arguments, reserved;
    struct ram_region ram[MAX_RAM_REGIONS];
    u64 argument[MAX_ARGUMENTS];
};

/* One per vCPU in the status page; the host may look at any time. */
struct status {
    volatile u64 work, checks, state, error, detail[4], values[8];
};

/* Each program defines this; what it returns is the exit code. */
static u64 run(const struct info *info, u64 cpu, struct status *status);

static inline void out8(u32 port, u8 value) {
    __asm__ volatile("outb %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 in8(u32 port) {
    u8 value;
    __asm__ volatile("inb %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void out32(u32 port, u32 value) {
    __asm__ volatile("outl %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u32 in32(u32 port) {
    u32 value;
    __asm__ volatile("inl %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void print(const char *text) {
    while (*text)
        out8(CONSOLE_PORT, (u8)*text++);
}

static inline void print_number(u64 value) {
    char digits[21], *at = digits + 20;
    *at = 0;
    do {
        *--at = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    print(at);
}

/* The one line that every program prints when it starts (vCPU 0 only). */
static inline void announce(const char *name, const struct info *info, u64 cpu) {
    if (cpu)
        return;
    print(name);
    print(": ");
    print_number(info->working_set_bytes / PAGE_SIZE);
    print(" pages, rate ");
    print_number(info->rate);
    print("/s, seed ");
    print_number(info->seed);
    print("\n");
}

/* Record an error and its details; returns the code, for run() to return in turn. */
static inline u64 fail(struct status *status, u64 code, u64 a, u64 b, u64 expected, u64 found) {
    status->detail[0] = a;
    status->detail[1] = b;
    status->detail[2] = expected;
    status->detail[3] = found;
    status->error = code;
    return code;
}

/* The finaliser of SplitMix64: a bijection on u64 that mixes well. */
static inline u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/* xorshift64: the next state, never 0. */
static inline u64 next_random(u64 *state) {
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static inline u64 first_random(const struct info *info, u64 cpu) {
    u64 state = mix(info->seed + 0x9e3779b97f4a7c15 * (cpu + 1));
    return state ? state : 1;
}

/* A uniform number below n (n > 0), without a division. */
static inline u64 below(u64 random, u64 n) { return (u64)(((unsigned __int128)random * n) >> 64); }

/* One vCPU's share of the working set: a range of its pages, which are RAM with the holes skipped. */
struct pages {
    u64 start, first_bytes, next_start, count;
};

static inline struct pages share_of_working_set(const struct info *info, u64 cpu, u64 cpus) {
    u64 total = info->working_set_bytes / PAGE_SIZE, from = total * cpu / cpus;
    u64 start = info->working_set_gpa, skip = from * PAGE_SIZE;
    for (u64 i = 0; i < info->ram_regions; i++) {
        u64 end = info->ram[i].gpa + info->ram[i].size_bytes;
        if (start > end)
            continue;
        if (start < info->ram[i].gpa)
            start = info->ram[i].gpa;
        if (skip < end - start || i + 1 == info->ram_regions) {
            u64 next = i + 1 < info->ram_regions ? info->ram[i + 1].gpa : 0;
            return (struct pages){start + skip, end - start - skip, next, total * (cpu + 1) / cpus - from};
        }
        skip -= end - start;
        start = end;
    }
    return (struct pages){start, 0, 0, 0};
}

static inline u64 page_gpa(const struct pages *pages, u64 index) {
    u64 at = index * PAGE_SIZE;
    return at < pages->first_bytes ? pages->start + at : pages->next_start + (at - pages->first_bytes);
}

static inline volatile u64 *page(const struct pages *pages, u64 index) {
    return (volatile u64 *)page_gpa(pages, index);
}

/* Keeps a loop at the wanted rate, in pieces of about 2 ms; a rate of 0 costs one comparison. */
struct pace {
    u64 rate, batch, left, due_us, now_us;
    u32 last;
};

static inline u64 clock_us(struct pace *pace) {
    u32 now = in32(CLOCK_PORT);
    pace->now_us += (u32)(now - pace->last);
    pace->last = now;
    return pace->now_us;
}

static inline struct pace pace_at(u64 rate) {
    struct pace pace = {.rate = rate};
    if (rate) {
        pace.batch = pace.left = rate > 500 ? rate / 500 : 1;
        pace.last = in32(CLOCK_PORT);
    }
    return pace;
}

static inline void wait_until(struct pace *pace, u64 due_us) {
    for (u64 now = clock_us(pace); now < due_us; now = clock_us(pace))
        out32(CLOCK_PORT, due_us - now < 1000000 ? (u32)(due_us - now) : 1000000);
}

/* Call once per operation. A program that fell behind by more than 100 ms (a pause, say) does not catch up. */
static inline void keep_pace(struct pace *pace) {
    if (!pace->rate || --pace->left)
        return;
    pace->left = pace->batch;
    pace->due_us += pace->batch * 1000000 / pace->rate;
    wait_until(pace, pace->due_us);
    if (pace->now_us > pace->due_us + 100000)
        pace->due_us = pace->now_us;
}

/* For a vCPU that has no part in the work. */
static inline u64 rest(struct status *status) {
    for (;; status->work++)
        out32(CLOCK_PORT, 1000000);
    return 0;
}

__attribute__((noreturn, section(".text.start"))) void _start(const struct info *info, u64 cpu) {
    struct status *status = (struct status *)info->status_gpa + cpu;
    u64 code = 255;
    if (info->magic == INFO_MAGIC && info->version == ABI_VERSION) {
        status->state = STATE_RUNNING;
        code = run(info, cpu, status);
        status->state = STATE_ENDED;
    }
    for (;;)
        out32(EXIT_PORT, (u32)code);
}

#endif
