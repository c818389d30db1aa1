/* timers: checks that no time of the guest runs backwards, nor apart from the others: the clock port, the timer, and the
 * wall clock, whatever pauses and migrations come between two looks.
 *
 * Guest time (clock and timer) stands still while the guest moves, the wall clock does not: it may run ahead of guest
 * time, never behind it. The hosts' own clocks must agree for that.
 *
 * Errors: 1 the clock went back (before, now), 2 the timer's count went back (before, now), 3 the timer disagrees with
 * the clock (periods at least, at most, found), 4 the wall clock went back (seconds before, now), 5 the wall clock lost
 * time (seconds of guest time, of wall time).
 * Status values: guest time in us, periods of the timer, seconds of wall time seen pass. */
#include "guest.h"

#define PERIOD_US 1000
#define COUNT(timer) ((timer) & 0x7fffffff)
#define UPDATE_IN_PROGRESS 0x80

/* The clock, in us; records error 1 when it is behind its last reading (or after a pause of more than 35 minutes). */
static u64 checked_us(struct pace *clock, struct status *status) {
    u32 last = clock->last;
    u64 now_us = clock_us(clock);
    if ((u32)(clock->last - last) >> 31)
        fail(status, 1, last, clock->last, 0, 0);
    return now_us;
}

static u8 rtc(u8 reg) {
    out8(RTC_PORT, reg);
    return in8(RTC_PORT + 1);
}

static u64 number(u8 bcd) { return (bcd >> 4) * 10 + (bcd & 15); }

/* Days of the Gregorian calendar since some day long ago; March is the first month of its year. */
static u64 days(u64 year, u64 month, u64 day) {
    if (month < 3) {
        year--;
        month += 12;
    }
    return year * 365 + year / 4 - year / 100 + year / 400 + (153 * (month - 3) + 2) / 5 + day;
}

/* Seconds of wall time. Read twice, until both agree: a pause may come between any two registers. */
static u64 wall_s(void) {
    for (u64 before = 0, now;; before = now) {
        while (rtc(0x0a) & UPDATE_IN_PROGRESS)
            ;
        u64 day = days(number(rtc(0x32)) * 100 + number(rtc(9)), number(rtc(8)), number(rtc(7)));
        now = ((day * 24 + number(rtc(4))) * 60 + number(rtc(2))) * 60 + number(rtc(0));
        if (now == before)
            return now;
    }
}

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    announce("timers", info, cpu);
    if (cpu)
        return rest(status);
    struct pace pace = pace_at(info->rate ? info->rate : 1000), clock = {.last = in32(CLOCK_PORT)};
    u64 first_s = wall_s(), last_s = first_s, periods = 0, armed_us = clock_us(&clock);
    out32(TIMER_PORT, PERIOD_US);
    u64 started_us = clock_us(&clock);
    for (;; status->work++) {
        u64 before_us = checked_us(&clock, status), count = COUNT(in32(TIMER_PORT + 4));
        u64 after_us = checked_us(&clock, status);
        if (status->error)
            return status->error;
        if (count < periods)
            return fail(status, 2, periods, count, 0, 0);
        u64 least = (before_us - started_us) / PERIOD_US, most = (after_us - armed_us) / PERIOD_US;
        if (count < least || count > most)
            return fail(status, 3, least, most, most, count);
        u64 seconds = wall_s();
        if (seconds < last_s)
            return fail(status, 4, last_s, seconds, 0, 0);
        if (seconds - first_s + 1 < (after_us - armed_us) / 1000000)
            return fail(status, 5, (after_us - armed_us) / 1000000, seconds - first_s, 0, 0);
        status->values[0] = after_us;
        status->values[1] = periods = count;
        status->values[2] = (last_s = seconds) - first_s;
        status->checks++;
        keep_pace(&pace);
    }
}
