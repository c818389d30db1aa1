/* rewrite: fills its working set once, then rewrites the first argument[0] bytes of it, page by page, for ever (with
   nothing to rewrite: waits). No word repeats within a page or from pass to pass. Before a page is rewritten it must be
   as it was left; so must one of the pages that are not, in turn. */
#include "guest.h"

#define STEP 0x9e3779b97f4a7c15
#define WORDS (PAGE_SIZE / sizeof(u64))

static u64 first_word(const struct info *info, u64 cpu, u64 index, u64 pass) {
    return mix(info->seed + STEP * (cpu + 1)) + mix(index + (pass << 32));
}

static void fill(volatile u64 *at, u64 word) {
    for (u64 i = 0; i < WORDS; i++, word += STEP)
        at[i] = word;
}

static int holds(volatile u64 *at, u64 word) { return at[0] == word && at[WORDS - 1] == word + (WORDS - 1) * STEP; }

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, cpu, info->cpus);
    u64 hot = info->arguments ? info->argument[0] / PAGE_SIZE / info->cpus : 0;
    hot = hot < pages.count ? hot : pages.count;
    announce("rewrite", info, cpu);
    for (u64 i = 0; i < pages.count; i++, status->work++)
        fill(page(&pages, i), first_word(info, cpu, i, 0));
    struct pace pace = pace_at(info->rate || hot ? info->rate : 1000);
    for (u64 pass = 1, at = 0, cold = hot;; status->work++) {
        u64 word = first_word(info, cpu, at, pass), last_word = first_word(info, cpu, at, pass - 1);
        status->values[0] = pass;
        if (hot && !holds(page(&pages, at), last_word))
            return fail(status, 1, at, pass, last_word, page(&pages, at)[0]);
        if (cold < pages.count && !holds(page(&pages, cold), first_word(info, cpu, cold, 0)))
            return fail(status, 2, cold, pass, first_word(info, cpu, cold, 0), page(&pages, cold)[0]);
        status->checks++;
        if (hot)
            fill(page(&pages, at), word);
        if (++cold >= pages.count)
            cold = hot;
        if (++at >= hot)
            at = 0, pass++;
        keep_pace(&pace);
    }
}
