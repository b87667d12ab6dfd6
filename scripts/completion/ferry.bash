# SPDX-License-Identifier: Apache-2.0
# bash completion for ferry. Commands and options are read from `ferry help` and
# `ferry COMMAND --help`, so that this file cannot go stale.
_ferry_commands()
{
    "$1" help 2>/dev/null | sed -n 's/^  \([a-z]\{2,\}\)  *.*/\1/p'
}

_ferry_options()
{
    "$@" --help 2>/dev/null | sed '/^examples\{0,1\}:/,/^$/d' |
        grep -oE -- '(^|[ []|, )--[a-z-]+' | tr -d ' [,' | sort -u
}

_ferry_vms()
{
    local dir=${FERRY_RUN_DIR:-}
    [ -n "$dir" ] || { [ "$(id -u)" = 0 ] && dir=/run/ferry; } || dir=${XDG_RUNTIME_DIR:-/run}/ferry
    local socket
    for socket in "$dir"/*.sock; do
        [ -S "$socket" ] && basename "$socket" .sock
    done
}

_ferry()
{
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local ferry=${COMP_WORDS[0]} command=${COMP_WORDS[1]} choices=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices=$(_ferry_commands "$ferry")
    else
        case $previous in
        --kernel | -k | --initrd | -i | --config | --config-file | --base | --failure-log | --svg)
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return
            ;;
        --boot | -b) choices="auto linux64 pvh bzimage multiboot real" ;;
        --backing | -B) choices="anonymous thp memfd hugetlb" ;;
        --dirty-log) choices="bitmap ring" ;;
        --console | -o) choices="stdio null pty file: unix: fd:" ;;
        --log) choices="error warn info debug" ;;
        --log-format) choices="text json" ;;
        --control | --vmgenid) choices="true false" ;;
        --sched) choices="auto off" ;;
        --boost) choices="realtime none" ;;
        --notice) choices="auto poll" ;;
        --weights) choices="vcpu vm" ;;
        --seccomp) choices="on off log" ;;
        --psk | --tls-ca | --tls-cert | --tls-key)
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return
            ;;
        --jail | --tls)
            mapfile -t COMPREPLY < <(compgen -d -- "$word")
            return
            ;;
        --transport) choices="mmio pci" ;;
        --scheduler) choices="fair proportional credit credit-cap" ;;
        --placement) choices="length weight" ;;
        --net) choices="tap= tap-fd= user" ;;
        --on-reboot) choices="stop reset" ;;
        --mode) choices="precopy postcopy hybrid local" ;;
        --layout) choices="packed mapped" ;;
        --compress)
            choices="auto always none"
            [ "$command" != snapshot ] || choices="lz4 none"
            ;;
        --balloon) [ "$command" != migrate ] || choices="auto off" ;;
        --prepaging) choices="none push forward bubble multi-bubble" ;;
        --on-stall) choices="continue cancel switch postcopy throttle" ;;
        *)
            case $word:$command in
            -*:sched) choices=$(_ferry_options "$ferry" "${COMP_WORDS[@]:1:COMP_CWORD > 2 ? 2 : 1}") ;;
            -*) choices=$(_ferry_options "$ferry" "$command") ;;
            *:sched)
                [ "${COMP_WORDS[2]}:$COMP_CWORD" != set:3 ] || choices=$(_ferry_vms)
                [ "$COMP_CWORD" -gt 2 ] ||
                    choices=$("$ferry" sched --help 2>/dev/null | sed -n 's/^  \([a-z]\{2,\}\)  *.*/\1/p')
                ;;
            *:snapshot) choices="create ls verify merge rm $(_ferry_vms)" ;;
            *:checkpoint) choices="ls $(_ferry_vms)" ;;
            *:rollback | *:clone | *:console | *:info | *:set | *:kill | *:rm | *:events | *:pause | *:resume | *:reset | *:stop) choices=$(_ferry_vms) ;;
            *:migrate) choices="$(_ferry_vms) status cancel set pause recover force-resume" ;;
            esac
            ;;
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
    if [ ${#COMPREPLY[@]} -eq 0 ] && [ -n "$word" ]; then
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    fi
}

complete -F _ferry ferry
