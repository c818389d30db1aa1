/* kv: an open-addressing hash table under inserts, updates and deletes, which checks itself all the time.
 *
 * The first pages of the working set are a directory: one generation per table page. The rest are table pages of 127
 * slots behind a header. Every change of a slot raises its page's generation in the header *and* in the directory, so
 * a page that is older or newer than the others is found even though it is consistent in itself. Each value carries a
 * checksum of key and version. Memory that is all zeros is a valid empty table. Linear probing; a delete shifts later
 * entries back, so there are no tombstones.
 *
 * Errors: 1 checksum (page, slot, expected, found), 2 page count, 3 page sum, 4 generation (page, 0, directory's, page's),
 * 5 live entries in all, 6 an entry that a lookup does not find (page, slot, key, where).
 * Status values: live entries, inserts, updates, deletes, full passes of the check. */
#include "guest.h"

#define SLOTS 127
#define CHECK_EVERY 4

struct slot {
    u64 key, version, value, checksum; /* key 0: empty */
};

struct header {
    u64 generation, live, sum, unused; /* sum: of the live slots' checksums */
};

struct table_page {
    struct header header;
    struct slot slots[SLOTS];
};

static struct pages pages_of[64]; /* per vCPU: each has a table of its own */

struct table {
    const struct pages *pages;
    u64 directory_pages, count, capacity, keys, live;
};

static struct table_page *table_page(const struct table *table, u64 index) {
    return (struct table_page *)page_gpa(table->pages, table->directory_pages + index);
}

static u64 *generation(const struct table *table, u64 index) {
    return (u64 *)page_gpa(table->pages, index / 512) + index % 512;
}

static struct slot *slot(const struct table *table, u64 index) {
    return &table_page(table, index / SLOTS)->slots[index % SLOTS];
}

static u64 value_of(u64 key, u64 version) { return mix(key * 3 + version); }

static u64 checksum(const struct slot *s) { return mix(mix(s->key) ^ mix(s->version + 1) ^ s->value); }

static u64 home(const struct table *table, u64 key) { return below(mix(key), table->capacity); }

static u64 after(const struct table *table, u64 index) { return index + 1 == table->capacity ? 0 : index + 1; }

/* Every write to the table goes through here. */
static void set_slot(struct table *table, u64 index, const struct slot *to) {
    struct table_page *page = table_page(table, index / SLOTS);
    struct slot *at = &page->slots[index % SLOTS];
    if (at->key) {
        page->header.live--;
        page->header.sum -= at->checksum;
    }
    if (to->key) {
        page->header.live++;
        page->header.sum += to->checksum;
    }
    *at = *to;
    page->header.generation++;
    ++*generation(table, index / SLOTS);
}

static u64 find(const struct table *table, u64 key) {
    u64 index = home(table, key);
    while (slot(table, index)->key && slot(table, index)->key != key)
        index = after(table, index);
    return index;
}

static void put(struct table *table, u64 index, u64 key, u64 version) {
    struct slot s = {key, version, value_of(key, version), 0};
    s.checksum = checksum(&s);
    set_slot(table, index, &s);
}

static void delete(struct table *table, u64 hole) {
    static const struct slot empty;
    for (u64 next = after(table, hole); slot(table, next)->key; next = after(table, next)) {
        u64 from = home(table, slot(table, next)->key);
        int stays = hole < next ? hole < from && from <= next : hole < from || from <= next;
        if (stays)
            continue;
        struct slot moved = *slot(table, next);
        set_slot(table, hole, &moved);
        hole = next;
    }
    set_slot(table, hole, &empty);
}

static u64 check_page(const struct table *table, u64 index, struct status *status) {
    const struct table_page *page = table_page(table, index);
    u64 live = 0, sum = 0, last = 0;
    if (page->header.generation != *generation(table, index))
        return fail(status, 4, index, 0, *generation(table, index), page->header.generation);
    for (u64 i = 0; i < SLOTS; i++) {
        const struct slot *s = &page->slots[i];
        if (!s->key)
            continue;
        if (s->checksum != checksum(s) || s->value != value_of(s->key, s->version))
            return fail(status, 1, index, i, checksum(s), s->checksum);
        live++;
        sum += s->checksum;
        last = i;
    }
    if (live != page->header.live)
        return fail(status, 2, index, 0, page->header.live, live);
    if (sum != page->header.sum)
        return fail(status, 3, index, 0, page->header.sum, sum);
    if (live && find(table, page->slots[last].key) != index * SLOTS + last)
        return fail(status, 6, index, last, page->slots[last].key, find(table, page->slots[last].key));
    status->checks++;
    return 0;
}

static u64 check_all(const struct table *table, struct status *status) {
    u64 live = 0;
    for (u64 i = 0; i < table->count; i++)
        live += table_page(table, i)->header.live;
    status->values[4]++;
    return live == table->live ? 0 : fail(status, 5, 0, 0, table->live, live);
}

static void change(struct table *table, u64 draw, struct status *status) {
    u64 key = 1 + below(draw, table->keys), index = find(table, key);
    if (!slot(table, index)->key) {
        put(table, index, key, draw >> 32);
        table->live++;
        status->values[1]++;
    } else if (draw & 3) {
        put(table, index, key, slot(table, index)->version + 1);
        status->values[2]++;
    } else {
        delete(table, index);
        table->live--;
        status->values[3]++;
    }
    status->values[0] = table->live;
    status->work++;
}

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    struct pages *pages = &pages_of[cpu];
    *pages = share_of_working_set(info, cpu, info->cpus);
    announce("kv", info, cpu);
    if (pages->count < 2)
        return rest(status);
    struct table table = {.pages = pages, .directory_pages = (pages->count + 512) / 513};
    table.count = pages->count - table.directory_pages;
    table.capacity = table.count * SLOTS;
    table.keys = table.capacity * 5 / 8; /* about half of the slots end up in use */
    struct pace pace = pace_at(info->rate);
    u64 random = first_random(info, cpu), code = 0, next = 0;
    for (u64 count = 1; !code; count++) {
        change(&table, next_random(&random), status);
        if (count % CHECK_EVERY == 0) {
            code = check_page(&table, next, status);
            if (++next == table.count) {
                next = 0;
                code = code ? code : check_all(&table, status);
            }
        }
        keep_pace(&pace);
    }
    return code;
}
