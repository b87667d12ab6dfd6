// SPDX-License-Identifier: Apache-2.0
// ELF kernels (System V gABI, chapters 4 and 5): only program headers count, segments go to
// p_paddr.
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

// XEN_ELFNOTE_PHYS32_ENTRY: where a PVH kernel is entered (Xen, public/elfnote.h).
#define NOTE_PVH_ENTRY 18

enum { PROGRAM_HEADERS_MAX = 256, NOTES_MAX = 64 * 1024 };

typedef unsigned long long ull;

bool elf_recognise(const struct image *img)
{
    char magic[SELFMAG];
    return !image_read(img, 0, magic, sizeof(magic), NULL) && !memcmp(magic, ELFMAG, SELFMAG);
}

static Elf64_Phdr phdr_widen(const Elf32_Phdr *p)
{
    return (Elf64_Phdr) {.p_type = p->p_type,
                         .p_flags = p->p_flags,
                         .p_offset = p->p_offset,
                         .p_vaddr = p->p_vaddr,
                         .p_paddr = p->p_paddr,
                         .p_filesz = p->p_filesz,
                         .p_memsz = p->p_memsz,
                         .p_align = p->p_align};
}

// The fields that 32- and 64-bit ELF headers share, in the wide form.
static int header_read(struct elf *elf, Elf64_Ehdr *h, struct error *err)
{
    const struct image *img = elf->img;
    unsigned char ident[EI_NIDENT];
    int ret = image_read(img, 0, ident, sizeof(ident), err);
    if (ret)
        return ret;
    if (ident[EI_CLASS] != ELFCLASS64 && ident[EI_CLASS] != ELFCLASS32)
        return error_set(err, -ENOEXEC, "%s: ELF class %u: expected 1 (32 bit) or 2 (64 bit)",
                         img->name, ident[EI_CLASS]);
    if (ident[EI_DATA] != ELFDATA2LSB)
        return error_set(err, -ENOEXEC, "%s: ELF data encoding %u: expected 1 (little endian)",
                         img->name, ident[EI_DATA]);
    elf->is64 = ident[EI_CLASS] == ELFCLASS64;
    if (elf->is64)
        return image_read(img, 0, h, sizeof(*h), err);

    Elf32_Ehdr h32;
    ret = image_read(img, 0, &h32, sizeof(h32), err);
    if (ret)
        return ret;
    *h = (Elf64_Ehdr) {.e_type = h32.e_type,
                       .e_machine = h32.e_machine,
                       .e_version = h32.e_version,
                       .e_entry = h32.e_entry,
                       .e_phoff = h32.e_phoff,
                       .e_phentsize = h32.e_phentsize,
                       .e_phnum = h32.e_phnum};
    return 0;
}

static int header_check(const struct elf *elf, const Elf64_Ehdr *h, struct error *err)
{
    const char *name = elf->img->name;
    uint16_t machine = elf->is64 ? EM_X86_64 : EM_386;
    size_t size = elf->is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr);
    if (h->e_machine != machine && !(h->e_machine == EM_X86_64 && !elf->is64))
        return error_set(err, -ENOEXEC, "%s: ELF machine %u: expected %u (%s)", name, h->e_machine,
                         machine, elf->is64 ? "x86-64" : "i386");
    if (h->e_type != ET_EXEC)
        return error_set(err, -ENOEXEC,
                         "%s: ELF type %u: expected 2 (an executable linked at a fixed address)",
                         name, h->e_type);
    if (h->e_version != EV_CURRENT)
        return error_set(err, -ENOEXEC, "%s: ELF version %u: expected 1", name, h->e_version);
    if (h->e_phentsize != size)
        return error_set(err, -ENOEXEC, "%s: ELF e_phentsize %u: expected %zu", name,
                         h->e_phentsize, size);
    if (!h->e_phnum || h->e_phnum > PROGRAM_HEADERS_MAX)
        return error_set(err, -ENOEXEC, "%s: %u program headers: expected 1 to %d", name,
                         h->e_phnum, PROGRAM_HEADERS_MAX);
    if (!range_within(h->e_phoff, h->e_phnum * size, elf->img->size))
        return error_set(err, -ENOEXEC,
                         "%s: too short: %u program headers at offset %#llx, the file has %#llx "
                         "bytes",
                         name, h->e_phnum, (ull)h->e_phoff, (ull)elf->img->size);
    return 0;
}

static int segment_add(struct elf *elf, unsigned index, const Elf64_Phdr *p, struct error *err)
{
    const char *name = elf->img->name;
    if (p->p_filesz > p->p_memsz)
        return error_set(err, -ENOEXEC, "%s: segment %u: p_filesz %#llx is more than p_memsz %#llx",
                         name, index, (ull)p->p_filesz, (ull)p->p_memsz);
    if (!range_within(p->p_offset, p->p_filesz, elf->img->size))
        return error_set(
            err, -ENOEXEC,
            "%s: segment %u: %#llx bytes at offset %#llx lie outside the file of %#llx "
            "bytes",
            name, index, (ull)p->p_filesz, (ull)p->p_offset, (ull)elf->img->size);
    if (!p->p_memsz)
        return 0;
    if (elf->nr_segments == ELF_SEGMENTS_MAX)
        return error_set(err, -ENOEXEC, "%s: more than %d segments to load", name,
                         ELF_SEGMENTS_MAX);
    elf->segments[elf->nr_segments++] = (struct elf_segment) {.index = index,
                                                              .offset = p->p_offset,
                                                              .filesz = p->p_filesz,
                                                              .paddr = p->p_paddr,
                                                              .memsz = p->p_memsz,
                                                              .executable = p->p_flags & PF_X};
    return 0;
}

// Looks at one note; sets has_pvh when it is Xen's PVH entry.
static void note_check(struct elf *elf, const Elf64_Nhdr *n, const uint8_t *name,
                       const uint8_t *desc)
{
    if (n->n_type != NOTE_PVH_ENTRY || n->n_namesz != 4 || memcmp(name, "Xen", 4))
        return;
    if (n->n_descsz != 4 && n->n_descsz != 8)
        return;
    elf->pvh_entry = 0;
    memcpy(&elf->pvh_entry, desc, n->n_descsz);
    elf->has_pvh = true;
}

static int notes_read(struct elf *elf, unsigned index, const Elf64_Phdr *p, struct error *err)
{
    const char *name = elf->img->name;
    if (p->p_filesz > NOTES_MAX)
        return error_set(err, -ENOEXEC,
                         "%s: segment %u: %#llx bytes of notes: expected at most %#x", name, index,
                         (ull)p->p_filesz, NOTES_MAX);
    autofree uint8_t *notes = malloc(p->p_filesz ? p->p_filesz : 1);
    if (!notes)
        return error_set(err, -ENOMEM, "%s: no memory for its notes", name);
    int ret = image_read(elf->img, p->p_offset, notes, p->p_filesz, err);
    if (ret)
        return ret;

    uint64_t align = p->p_align == 8 ? 8 : 4;
    for (uint64_t at = 0; p->p_filesz - at >= sizeof(Elf64_Nhdr);) {
        Elf64_Nhdr n; // 32- and 64-bit notes are alike
        memcpy(&n, notes + at, sizeof(n));
        uint64_t name_at = at + sizeof(n);
        uint64_t desc_at = align_up(name_at + n.n_namesz, align);
        uint64_t next = align_up(desc_at + n.n_descsz, align);
        if (desc_at + n.n_descsz > p->p_filesz)
            return error_set(err, -ENOEXEC,
                             "%s: segment %u: note at %#llx (name %u, content %u bytes) runs past "
                             "the segment's %#llx bytes",
                             name, index, (ull)at, n.n_namesz, n.n_descsz, (ull)p->p_filesz);
        note_check(elf, &n, notes + name_at, notes + desc_at);
        if (next >= p->p_filesz)
            break;
        at = next;
    }
    return 0;
}

static int program_headers_read(struct elf *elf, const Elf64_Ehdr *h, struct error *err)
{
    size_t bytes = (size_t)h->e_phnum * h->e_phentsize;
    autofree uint8_t *table = malloc(bytes);
    if (!table)
        return error_set(err, -ENOMEM, "%s: no memory for its program headers", elf->img->name);
    int ret = image_read(elf->img, h->e_phoff, table, bytes, err);
    for (unsigned i = 0; !ret && i < h->e_phnum; i++) {
        Elf64_Phdr p;
        Elf32_Phdr p32;
        if (elf->is64) {
            memcpy(&p, table + i * sizeof(p), sizeof(p));
        } else {
            memcpy(&p32, table + i * sizeof(p32), sizeof(p32));
            p = phdr_widen(&p32);
        }
        if (p.p_type == PT_LOAD)
            ret = segment_add(elf, i, &p, err);
        else if (p.p_type == PT_NOTE)
            ret = notes_read(elf, i, &p, err);
    }
    return ret;
}

int elf_parse(struct elf *elf, const struct image *img, struct error *err)
{
    *elf = (struct elf) {.img = img};
    Elf64_Ehdr h;
    int ret = header_read(elf, &h, err);
    if (!ret)
        ret = header_check(elf, &h, err);
    if (ret)
        return ret;
    elf->machine = h.e_machine;
    elf->entry = h.e_entry;
    ret = program_headers_read(elf, &h, err);
    if (!ret && !elf->nr_segments)
        return error_set(err, -ENOEXEC, "%s: no segment to load", img->name);
    return ret;
}

bool elf_executable_at(const struct elf *elf, uint64_t address)
{
    for (unsigned i = 0; i < elf->nr_segments; i++) {
        const struct elf_segment *s = &elf->segments[i];
        if (s->executable && address >= s->paddr && address - s->paddr < s->filesz)
            return true;
    }
    return false;
}

// All segments must lie between LAYOUT_KERNEL and the end of low RAM, clear of one another.
static int segments_check(const struct elf *elf, const struct ram *ram, struct error *err)
{
    uint64_t end = boot_low_end(ram);
    for (unsigned i = 0; i < elf->nr_segments; i++) {
        const struct elf_segment *s = &elf->segments[i];
        if (s->paddr < LAYOUT_KERNEL || !range_within(s->paddr, s->memsz, end))
            return error_set(err, -ENOEXEC,
                             "%s: segment %u: %#llx bytes at address %#llx: expected within "
                             "%#x..%#llx, the guest's %llu MiB of memory",
                             elf->img->name, s->index, (ull)s->memsz, (ull)s->paddr, LAYOUT_KERNEL,
                             (ull)end, (ull)(ram->size / MiB));
        for (unsigned j = 0; j < i; j++) {
            const struct elf_segment *o = &elf->segments[j];
            if (s->paddr < o->paddr + o->memsz && o->paddr < s->paddr + s->memsz)
                return error_set(
                    err, -ENOEXEC, "%s: segments %u (%#llx..%#llx) and %u (%#llx..%#llx) overlap",
                    elf->img->name, o->index, (ull)o->paddr, (ull)(o->paddr + o->memsz), s->index,
                    (ull)s->paddr, (ull)(s->paddr + s->memsz));
        }
    }
    return 0;
}

int elf_load(const struct elf *elf, const struct load *load, struct error *err)
{
    int ret = segments_check(elf, load->ram, err);
    uint64_t start = UINT64_MAX, end = 0;
    for (unsigned i = 0; !ret && i < elf->nr_segments; i++) {
        const struct elf_segment *s = &elf->segments[i];
        start = s->paddr < start ? s->paddr : start;
        end = s->paddr + s->memsz > end ? s->paddr + s->memsz : end;
        // The rest up to p_memsz is zero already: RAM is fresh.
        ret = image_read_ram(elf->img, s->offset, load->ram, s->paddr, s->filesz, err);
    }
    if (ret)
        return ret;
    load->entry->kernel_start = start;
    load->entry->kernel_end = end;
    return 0;
}
