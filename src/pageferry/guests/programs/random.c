/* random: each operation writes a page drawn at random: a random word of it becomes the number of the operation. */
#include "guest.h"

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, cpu, info->cpus);
    struct pace pace = pace_at(info->rate);
    u64 random = first_random(info, cpu);
    announce("random", info, cpu);
    if (!pages.count)
        return rest(status);
    for (u64 count = 1;; count++) {
        u64 draw = next_random(&random);
        page(&pages, below(draw, pages.count))[draw & 511] = count;
        status->work++;
        keep_pace(&pace);
    }
}
