/* stamp: for the test oracle. At a sync point it is told a round number, writes it to the pages that the generator
 * below picks, one word in each, and ends the round at the next sync point.
 *
 * Page i of the working set is written in round r if the low byte of mix(key(r) + i * STEP) is below the round's
 * density, where key(r) = mix(seed + r * STEP). The density is in 256ths: argument number r mod (how many arguments
 * there are), or 64 when there are none. The word is number mix(seed + i * STEP) mod 512, whatever the round. All
 * arithmetic is modulo 2^64. pageferry/testing/oracle.py computes the same. */
#include "guest.h"

#define STEP 0x9e3779b97f4a7c15

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages pages = share_of_working_set(info, 0, 1);
    announce("stamp", info, cpu);
    if (cpu)
        return rest(status);
    struct pace pace = pace_at(info->rate);
    for (u64 done = 0;;) {
        out32(SYNC_PORT, (u32)done);
        u64 round = in32(SYNC_PORT);
        u64 density = info->arguments ? info->argument[round % info->arguments] : 64;
        u64 key = mix(info->seed + round * STEP);
        for (u64 i = 0; i < pages.count; i++)
            if ((mix(key + i * STEP) & 255) < density)
                page(&pages, i)[mix(info->seed + i * STEP) & 511] = round;
        status->values[0] = round;
        status->work++;
        done = round;
        keep_pace(&pace);
    }
}
