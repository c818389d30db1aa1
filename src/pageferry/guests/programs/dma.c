/* dma: fills a piece of the working set's lower half through the DMA engine, copies it to the upper half, and checks
 * the completion flag (a word of the first page) and every word of both pieces.
 *
 * Errors: 1 the status register, 2 the completion flag, 3 filled words, 4 copied words, 5 a bad transfer was not
 * refused. Details: gpa, length, expected, found. */
#include "guest.h"

#define SOURCE 0x00
#define TARGET 0x08
#define LENGTH 0x10
#define FLAG 0x18
#define PATTERN 0x20
#define COMMAND 0x28
#define STATUS 0x2c
#define FILL 1
#define COPY 2
#define DONE 1
#define REFUSED 2
#define MAX_WORDS 1024

static inline void put(u32 reg, u64 value) { *(volatile u64 *)(DMA_MMIO + (u64)reg) = value; }

static u32 command(u32 what) {
    *(volatile u32 *)(DMA_MMIO + COMMAND) = what;
    return *(volatile u32 *)(DMA_MMIO + STATUS);
}

static u64 refuses_the_hole(struct status *status) {
    put(TARGET, DMA_MMIO);
    put(LENGTH, 8);
    u32 found = command(FILL);
    return found == REFUSED ? 0 : fail(status, 5, DMA_MMIO, 8, REFUSED, found);
}

static u64 check_words(struct status *status, u64 code, u64 gpa, u64 words, u64 pattern) {
    for (u64 i = 0; i < words; i++) {
        u64 found = ((volatile u64 *)gpa)[i];
        if (found != pattern)
            return fail(status, code, gpa + 8 * i, 8 * words, pattern, found);
    }
    return 0;
}

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, 0, 1);
    struct pace pace = pace_at(info->rate);
    u64 random = first_random(info, cpu);
    announce("dma", info, cpu);
    if (cpu)
        return rest(status);
    /* A transfer does not cross a hole in RAM: use the larger side of it. */
    u64 bytes = pages.count * PAGE_SIZE, start = pages.start;
    if (bytes > pages.first_bytes) {
        if (bytes - pages.first_bytes > pages.first_bytes) {
            start = pages.next_start;
            bytes -= pages.first_bytes;
        } else
            bytes = pages.first_bytes;
    }
    volatile u64 *flag = (volatile u64 *)start;
    u64 half = (bytes - PAGE_SIZE) / 2 & ~7ul, lower = start + PAGE_SIZE, upper = lower + half;
    u64 code = refuses_the_hole(status);
    put(FLAG, (u64)flag);
    for (u64 transfers = 0; !code; status->work++) {
        u64 pattern = next_random(&random);
        u64 most = half / 8 < MAX_WORDS ? half / 8 : MAX_WORDS;
        u64 words = 1 + below(next_random(&random), most);
        u64 offset = 8 * below(next_random(&random), half / 8 - words + 1);
        put(TARGET, lower + offset);
        put(LENGTH, 8 * words);
        put(PATTERN, pattern);
        u32 found = command(FILL);
        if (found != DONE)
            return fail(status, 1, lower + offset, 8 * words, DONE, found);
        if (*flag != ++transfers)
            return fail(status, 2, (u64)flag, 8, transfers, *flag);
        if ((code = check_words(status, 3, lower + offset, words, pattern)))
            return code;
        put(SOURCE, lower + offset);
        put(TARGET, upper + offset);
        found = command(COPY);
        if (found != DONE)
            return fail(status, 1, upper + offset, 8 * words, DONE, found);
        if (*flag != ++transfers)
            return fail(status, 2, (u64)flag, 8, transfers, *flag);
        code = check_words(status, 4, upper + offset, words, pattern);
        status->checks += 4;
        keep_pace(&pace);
    }
    return code;
}
