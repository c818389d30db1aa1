/* pagetables: rewrites its own page tables. Each vCPU has a window of 64 virtual pages, far above RAM, whose page table
 * it owns. An operation points one page of the window at a random page of the working set, writes a word through it,
 * and checks what it finds there: the same word by the identity map, and through the old mapping what was last written.
 * Every 16 operations share one TLB flush (a write to the invalidate port), for ring 3 cannot flush by itself.
 *
 * Errors: 1 the word is not found by the identity map, 2 the processor did not set accessed and dirty, 3 the word is not
 * found through the window before its page is taken away, 4 nor by a 2 MiB mapping. Details: gpa, slot, expected,
 * found. Values: TLB flushes. */
#include "guest.h"

#define WINDOW 0x8000000000ul /* PML4 entry 1 */
#define PML4 0x10000ul        /* where the ABI puts it */
#define SLOTS 64
#define BATCH 16
#define TABLE 7ul /* present, writable, user */
#define ACCESSED 0x20ul
#define DIRTY 0x40ul
#define LARGE 0x80ul
#define FRAME 0xffffffffff000ul
#define MAX_CPUS 12

#define PAGES __attribute__((aligned(PAGE_SIZE)))

/* One PDPT for all; its entry n leads to vCPU n's directory: entry 0 is the window, entry 1 a large page. */
static volatile u64 pdpt[512] PAGES, directory[MAX_CPUS][512] PAGES, window_table[MAX_CPUS][512] PAGES;

struct window {
    volatile u64 *entries, *large;
    u64 gva, written[SLOTS], word[SLOTS];
};

static void set_up(struct window *w, u64 cpu) {
    w->entries = window_table[cpu];
    w->large = &directory[cpu][1];
    w->gva = WINDOW + (cpu << 30);
    directory[cpu][0] = (u64)window_table[cpu] | TABLE;
    pdpt[cpu] = (u64)directory[cpu] | TABLE;
    ((volatile u64 *)PML4)[1] = (u64)pdpt | TABLE;
    for (u64 slot = 0; slot < SLOTS; slot++)
        w->written[slot] = 0;
}

static volatile u64 *through_window(struct window *w, u64 slot) {
    return (volatile u64 *)(w->gva + slot * PAGE_SIZE + w->word[slot]);
}

/* Through the mapping as it is: the value last written there. Then take the page away and give it another. */
static u64 remap(struct window *w, struct status *status, u64 slot, u64 gpa, u64 word) {
    if (w->written[slot]) {
        u64 found = *through_window(w, slot);
        if (found != w->written[slot])
            return fail(status, 3, w->entries[slot] & FRAME, slot, w->written[slot], found);
    }
    w->entries[slot] = gpa | TABLE;
    w->word[slot] = word;
    return 0;
}

static u64 check(struct window *w, struct status *status, u64 slot, u64 gpa) {
    u64 found = *(volatile u64 *)(gpa + w->word[slot]);
    if (found != w->written[slot])
        return fail(status, 1, gpa, slot, w->written[slot], found);
    u64 entry = w->entries[slot], wanted = gpa | TABLE | ACCESSED | DIRTY;
    if (entry != wanted)
        return fail(status, 2, gpa, slot, wanted, entry);
    return 0;
}

/* The 2 MiB around gpa by a large page, which lies in RAM or the hole; only what is at gpa is looked at. */
static u64 check_large(struct window *w, struct status *status, u64 slot, u64 gpa) {
    *w->large = (gpa & ~0x1ffffful) | TABLE | LARGE;
    out32(INVALIDATE_PORT, 0);
    status->values[0]++;
    u64 found = *(volatile u64 *)(w->gva + 0x200000 + (gpa & 0x1fffff) + w->word[slot]);
    return found == w->written[slot] ? 0 : fail(status, 4, gpa, slot, w->written[slot], found);
}

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    static struct window windows[MAX_CPUS];
    struct pages pages = share_of_working_set(info, cpu, info->cpus);
    struct window *w = &windows[cpu];
    struct pace pace = pace_at(info->rate);
    u64 random = first_random(info, cpu), code = 0, gpas[BATCH];
    announce("pagetables", info, cpu);
    if (!pages.count)
        return rest(status);
    set_up(w, cpu);
    for (u64 first = 0, count = 1;; first = (first + BATCH) % SLOTS) {
        for (u64 i = 0; i < BATCH; i++) {
            u64 draw = next_random(&random);
            gpas[i] = page_gpa(&pages, below(draw, pages.count));
            /* A word for each slot: pages may be in the window several times. */
            if ((code = remap(w, status, first + i, gpas[i], (first + i) * 8)))
                return code;
        }
        out32(INVALIDATE_PORT, 0);
        status->values[0]++;
        for (u64 i = 0; i < BATCH; i++) {
            w->written[first + i] = count++;
            *through_window(w, first + i) = w->written[first + i];
        }
        for (u64 i = 0; i < BATCH; i++) {
            if ((code = check(w, status, first + i, gpas[i])))
                return code;
            status->checks++;
            status->work++;
            keep_pace(&pace);
        }
        if ((code = check_large(w, status, first, gpas[0])))
            return code;
    }
}
