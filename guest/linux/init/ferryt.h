// SPDX-License-Identifier: Apache-2.0
#pragma once

// The guest's own programs, one static binary chosen by argv[0] (or by argv[1] when called
// `ferryt`). Each takes main's arguments and returns an exit status.
int init_main(int argc, char **argv);
int vectest_main(int argc, char **argv);
int counter_main(int argc, char **argv);
int info_main(int argc, char **argv);
int dirty_main(int argc, char **argv);
int verify_main(int argc, char **argv);
int sock_main(int argc, char **argv);
int memhog_main(int argc, char **argv);
int portecho_main(int argc, char **argv);
int offload_main(int argc, char **argv);

// Parses a decimal number between min and max; on anything else prints what was expected of
// `what` and exits with status 2.
long number_parse(const char *what, const char *text, long min, long max);

// Reads a whole small file into buf as a string. Returns its length, or -1 with errno set.
long file_read(const char *path, char *buf, long size);
