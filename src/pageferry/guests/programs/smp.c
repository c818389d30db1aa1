/* smp: vCPUs that share memory, without atomic instructions. Each vCPU sends numbered items to the next vCPU and to the
 * one before it, and checks what these two send to it.
 *
 * The working set is cut into two rings per vCPU: ring 2n carries items from vCPU n to the next, ring 2n + 1 to the one
 * before. The first page of a ring holds two counters: items put, written by the sender only, and items taken, written
 * by the receiver only. The other pages hold 32 items each. An item is written before the counter that says so, and
 * read before the counter that frees its place: ordinary stores and loads of eight bytes, which x86 keeps in order, are
 * enough. The receiver checks every item, and the sender checks it once more before it puts another in its place; what a
 * counter was last seen at is kept elsewhere too. So an old copy of any page is found within one round of its ring.
 *
 * Errors: 1 an item's number (ring, page, expected, found), 2 an item's checksum, 3 a word of it (ring, word), 4 a
 * counter that went back, or too far (ring, 0 put or 1 taken, last seen, found).
 * Status values: items sent, items received, passes without anything to do. */
#include "guest.h"

#define ITEM_WORDS 16
#define ITEMS_PER_PAGE (PAGE_SIZE / 8 / ITEM_WORDS)
#define TAKEN 64 /* word of the first page: another cache line than the sender's */
#define IDLE_PASSES 2000
#define IDLE_US 200

struct ring {
    struct pages pages;
    u64 number, key, capacity, put, taken; /* put, taken: ours, or as last seen */
};

static struct ring ring_at(const struct info *info, u64 number) {
    struct ring ring = {.pages = share_of_working_set(info, number, 2 * info->cpus), .number = number};
    ring.key = mix(info->seed + number);
    ring.capacity = ring.pages.count > 1 ? (ring.pages.count - 1) * ITEMS_PER_PAGE : 0;
    return ring;
}

static u64 page_of(const struct ring *ring, u64 item) { return 1 + item % ring->capacity / ITEMS_PER_PAGE; }

static volatile u64 *place(const struct ring *ring, u64 item) {
    return page(&ring->pages, page_of(ring, item)) + item % ring->capacity % ITEMS_PER_PAGE * ITEM_WORDS;
}

static u64 word_of(const struct ring *ring, u64 item, u64 word) { return mix(ring->key + item * ITEM_WORDS + word); }

/* The item is there, whole, with the words that its number asks for. */
static u64 check(const struct ring *ring, u64 item, struct status *status) {
    volatile u64 *at = place(ring, item);
    u64 sum = at[0];
    if (sum != item + 1)
        return fail(status, 1, ring->number, page_of(ring, item), item + 1, sum);
    for (u64 word = 1; word < ITEM_WORDS - 1; word++) {
        u64 found = at[word], expected = word_of(ring, item, word);
        if (found != expected)
            return fail(status, 3, ring->number, word, expected, found);
        sum = mix(sum ^ found);
    }
    if (at[ITEM_WORDS - 1] != sum)
        return fail(status, 2, ring->number, page_of(ring, item), sum, at[ITEM_WORDS - 1]);
    status->checks++;
    return 0;
}

static u64 send(struct ring *ring, struct status *status) {
    u64 taken = page(&ring->pages, 0)[TAKEN];
    if (taken < ring->taken || taken > ring->put)
        return fail(status, 4, ring->number, 1, ring->taken, taken);
    ring->taken = taken;
    if (ring->put - taken == ring->capacity)
        return 0;
    if (ring->put >= ring->capacity && check(ring, ring->put - ring->capacity, status))
        return status->error;
    volatile u64 *at = place(ring, ring->put);
    u64 sum = at[0] = ring->put + 1;
    for (u64 word = 1; word < ITEM_WORDS - 1; word++)
        sum = mix(sum ^ (at[word] = word_of(ring, ring->put, word)));
    at[ITEM_WORDS - 1] = sum;
    if (page(&ring->pages, 0)[0] != ring->put)
        return fail(status, 4, ring->number, 0, ring->put, page(&ring->pages, 0)[0]);
    page(&ring->pages, 0)[0] = ++ring->put; /* volatile: after the item */
    status->values[0]++;
    return 0;
}

static u64 receive(struct ring *ring, struct status *status) {
    u64 put = page(&ring->pages, 0)[0];
    if (put < ring->put || put - ring->taken > ring->capacity)
        return fail(status, 4, ring->number, 0, ring->put, put);
    ring->put = put;
    if (put == ring->taken)
        return 0;
    if (check(ring, ring->taken, status))
        return status->error;
    if (page(&ring->pages, 0)[TAKEN] != ring->taken)
        return fail(status, 4, ring->number, 1, ring->taken, page(&ring->pages, 0)[TAKEN]);
    page(&ring->pages, 0)[TAKEN] = ++ring->taken;
    status->values[1]++;
    status->work++;
    return 0;
}

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    u64 before = (cpu + info->cpus - 1) % info->cpus, after = (cpu + 1) % info->cpus;
    struct ring out[2] = {ring_at(info, 2 * cpu), ring_at(info, 2 * cpu + 1)};
    struct ring in[2] = {ring_at(info, 2 * before), ring_at(info, 2 * after + 1)};
    struct pace pace = pace_at(info->rate);
    u64 idle = 0, code = 0;
    announce("smp", info, cpu);
    if (info->working_set_bytes / PAGE_SIZE < 4 * info->cpus)
        return rest(status);
    while (!code) {
        u64 done = status->values[0] + status->values[1];
        for (u64 i = 0; i < 2 && !code; i++) {
            u64 received = status->values[1];
            code = send(&out[i], status);
            if (!code)
                code = receive(&in[i], status);
            if (status->values[1] != received)
                keep_pace(&pace);
        }
        if (status->values[0] + status->values[1] != done) {
            idle = 0;
            continue;
        }
        status->values[2]++;
        if (++idle == IDLE_PASSES) { /* the other vCPU may have no CPU of the host now */
            out32(CLOCK_PORT, IDLE_US);
            idle = 0;
        }
    }
    return code;
}
