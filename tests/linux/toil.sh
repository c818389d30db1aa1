# Real work in a guest, for ever: programs out of Debian on the disk /dev/vda, each of which checks what it does.
# A job that ends well is begun anew, and says so; one that finds an error says what it was, and is not.
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
        echo "toil: $name $turn"
    done
    echo "toil: WRONG $name: $(tail -n 3 "/tmp/$name.log" | tr '\n' ' ')"
}

database() {
    echo "pragma journal_mode=wal; create table if not exists t (n integer primary key, text blob);
        insert into t (text) select randomblob(200) from generate_series(1, 200);
        delete from t where n in (select n from t order by random() limit 100);
        pragma integrity_check;" | chroot /root sqlite3 /toil/db | tail -n 1 | grep -qx ok
}

store() {
    chroot /root redis-cli set "key$turn" "value$turn" | grep -qx OK &&
        chroot /root redis-benchmark -q -n 300 -c 2 -t set,get,lpush &&
        [ "$(chroot /root redis-cli get "key$turn")" = "value$turn" ]
}

memory() { chroot /root memtester 2M 1; }
stress() { chroot /root stress-ng --verify --cpu 1 --vm 1 --vm-bytes 8M --fork 1 --pipe 1 --timeout 5 --temp-path /toil; }
disk() { chroot /root fio --name=toil --directory=/toil --rw=randrw --bs=4k --size=4M --verify=crc32c --verify_fatal=1; }

chroot /root redis-server --save '' --appendonly no >/tmp/redis.log 2>&1 &
until chroot /root redis-cli ping >/dev/null 2>&1; do sleep 1; done
echo "toil: begun"
for name in memory stress disk database store; do job "$name" "$name" & done
wait
