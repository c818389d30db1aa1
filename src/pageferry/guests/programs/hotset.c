/* hotset: 90 % of the writes go to the first 10 % of the pages, the rest to all the others. */
#include "guest.h"

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, cpu, info->cpus);
    struct pace pace = pace_at(info->rate);
    u64 random = first_random(info, cpu);
    u64 hot = (pages.count + 9) / 10, cold = pages.count - hot;
    announce("hotset", info, cpu);
    if (!pages.count)
        return rest(status);
    for (u64 count = 1;; count++) {
        u64 which = next_random(&random), draw = next_random(&random);
        u64 index = below(which, 10) && cold ? below(draw, hot) : hot + below(draw, cold);
        page(&pages, cold ? index : below(draw, hot))[draw & 511] = count;
        status->work++;
        status->values[index < hot ? 0 : 1]++; /* hot writes, cold writes */
        keep_pace(&pace);
    }
}
