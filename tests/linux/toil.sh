# Real work in a guest, for ever: programs out of Debian on the disk /dev/vda, each of which checks what it does.
# A job that ends well is begun anew, and says so; one that finds an error says what it was, and is not.
# ADDRESS is this guest's in its network, with the length of the prefix; PEER is whose TCP port 7 gives back what it gets.
export PATH=/bin:/usr/bin:/usr/sbin:/sbin
mount -o noatime /dev/vda /root || { echo "toil: WRONG disk"; exit 1; }
for name in proc sys dev; do mount -o bind "/$name" "/root/$name"; done
mount -t tmpfs tmp /root/tmp
mkdir -p /root/toil

job() {
    name=$1 turn=0
    shift
    while "$@" >"/tmp/$name.log" 2>&1; do
        turn=$((turn + 1))
        printf '\ntoil: %s %d\n' "$name" "$turn"
    done
    printf '\ntoil: WRONG %s: %s\n' "$name" "$(tail -n 20 "/tmp/$name.log" | tr '\n' ' ')"
}

database() {
    echo "pragma journal_mode=wal; create table if not exists t (n integer primary key, text blob);
        insert into t (text) select randomblob(200) from generate_series(1, 200);
        delete from t where n in (select n from t order by random() limit 100);
        pragma integrity_check;" | chroot /root sqlite3 /toil/db | tail -n 1 | grep -qx ok
}

store() {
    chroot /root redis-cli set "key$turn" "value$turn" | grep -qx OK &&
        chroot /root redis-benchmark -q -n 100 -c 2 -t set,get,lpush &&
        [ "$(chroot /root redis-cli get "key$turn")" = "value$turn" ]
}

memory() { chroot /root memtester 256K 1; }
stress() { # so much work, not so much time: a worker that begins late would have none of it, and say that it failed
    chroot /root stress-ng --verify --temp-path /toil --cpu 1 --cpu-ops 2 --vm 1 --vm-bytes 2M --vm-ops 5 \
        --fork 1 --fork-ops 20 --pipe 1 --pipe-ops 500
}
disk() { chroot /root fio --name=toil --directory=/toil --rw=randrw --bs=4k --size=1M --verify=crc32c --verify_fatal=1; }

# One TCP connection, for as long as this runs: what is said on it comes back.
link() {
    seq "$turn" $((turn + 2000)) >/tmp/said
    cat /tmp/said >&3
    head -n 2001 <&4 | cmp - /tmp/said
}

ip addr add "$ADDRESS" dev eth0
ip link set eth0 up
mkfifo /tmp/to /tmp/from
nc "$PEER" 7 </tmp/to >/tmp/from &
exec 3>/tmp/to 4</tmp/from

chroot /root redis-server --save '' --appendonly no >/tmp/redis.log 2>&1 &
until chroot /root redis-cli ping >/dev/null 2>&1; do sleep 1; done
echo "toil: begun"
for name in memory stress disk database store link; do job "$name" "$name" & done
wait
