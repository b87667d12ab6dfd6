#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What udhcpc runs on each event; it sets the variables.
# shellcheck disable=SC2154
case $1 in
deconfig) ifconfig "$interface" 0.0.0.0 ;;
bound | renew)
    ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}"
    for gateway in $router; do route add default gw "$gateway" dev "$interface"; done
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
esac
