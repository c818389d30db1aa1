# Work that checks itself, for ever: files that must not change, sums that must come out again, processes and pipes, and
# numbers with fractions. It says a line per round; at the first error it says what is wrong, and ends.
FILES=16
LINES=4000

fail() { echo "work: WRONG in round $round: $1"; exit 1; }
numbers() { seq "$1" $(($1 + LINES)); }
fractions() { awk 'BEGIN { for (i = 1; i < 2000; i++) sum += i / (i * i + 0.7); printf "%.12f", sum }'; }

mkdir -p /tmp/work
cd /tmp/work || exit 1
sum=$(fractions)
round=0
while :; do
    file=$((round % FILES))
    if [ "$round" -ge "$FILES" ]; then
        written=$(cat "$file.sum")
        [ "$(sha256sum <"$file")" = "$written" ] || fail "file $file is not what was written"
        [ "$(numbers $((round - FILES)) | sha256sum)" = "$written" ] || fail "the same numbers have another sum"
    fi
    numbers "$round" | tee "$file" | sha256sum >"$file.sum"
    [ "$(fractions)" = "$sum" ] || fail "the same fractions have another sum"
    round=$((round + 1))
    echo "work: round $round"
done
