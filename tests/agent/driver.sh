# The smallest driver of a living shell: one command after another, each with its own FIFOs.
set -m
command_of() { . "/run/devboxd/x/$1/c"; }
while IFS= read -r key <&20; do
    folder=/run/devboxd/x/$key
    input=/dev/null
    [ -p "$folder/0" ] && input=$folder/0
    { printf 'S %s\n' "$key" >&21; command_of "$key" 20<&- 21>&-; } <"$input" >"$folder/1" 2>"$folder/2"
    printf 'E %s %s\n' "$key" "$?" >&21
done
