/* sweep: writes each page of the working set in turn, for ever: the first word becomes the number of the pass. */
#include "guest.h"

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, cpu, info->cpus);
    struct pace pace = pace_at(info->rate);
    announce("sweep", info, cpu);
    if (!pages.count)
        return rest(status);
    for (u64 pass = 1;; pass++) {
        status->values[0] = pass;
        for (u64 i = 0; i < pages.count; i++) {
            *page(&pages, i) = pass;
            status->work++;
            keep_pace(&pace);
        }
    }
}
