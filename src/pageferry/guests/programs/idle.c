/* idle: waits on the clock, 1 ms at a time (or 1/rate), and counts. */
#include "guest.h"

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pace pace = pace_at(info->rate ? info->rate : 1000);
    announce("idle", info, cpu);
    for (;; status->work++)
        keep_pace(&pace);
    return 0;
}
