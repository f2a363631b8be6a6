//! The smallest kernels that there are.

#![allow(unreachable_pub)] // a module of test binaries

/// An ELF file for x86-64 whose only program is this one, at 1 MiB.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 0x10_0000;
    /// Bytes of both headers, behind which the program lies.
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // executable, x86-64
    }
    file.extend(1u32.to_le_bytes());
    for word in [AT, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, no section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes()); // sizes and counts of headers
    }
    for word in [1u32, 5] {
        file.extend(word.to_le_bytes()); // to be loaded, readable and executable
    }
    for word in [HEADERS, AT, AT, code.len() as u64, code.len() as u64, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}
