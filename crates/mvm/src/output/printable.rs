//! Text of strangers on a terminal: what an image, a registry, a guest or a tool says may hold escape
//! sequences, which would move the cursor, rename the window or type into the shell.
//!
//! [`super::Ui`] passes everything that it prints through these functions. The bytes of a program or a
//! file go around it, through [`super::raw`].

use std::fmt::Write as _;

/// Whether a character steers a terminal, or the order in which it shows others, instead of being shown.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// One line: everything that steers is shown as Rust writes it, line ends too.
pub(crate) fn printable(line: &str) -> String {
    escaped(line.trim_end(), |c| c == '\t')
}

/// Text of several lines, which are kept.
pub(crate) fn printable_text(text: &str) -> String {
    escaped(text, |c| matches!(c, '\t' | '\n'))
}

fn escaped(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) && !is_kept(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// The same JSON: what steers is only ever inside of strings, and may be written as a number there.
pub(crate) fn printable_json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) && c != '\n' {
            true => {
                let _ = write!(shown, "\\u{:04x}", u32::from(c));
            }
            false => shown.push(c),
        }
    }
    shown
}

/// Longest sequence of parameters of a colour, in bytes.
const COLOR_MAX: usize = 32;

/// A program's output on its way to a terminal: text, line ends and colours pass, and every other
/// sequence is shown instead of obeyed. Pieces may end anywhere.
#[derive(Debug, Default)]
pub(crate) struct TerminalFilter {
    state: Filtering,
    is_colored: bool,
}

#[derive(Debug, Default)]
enum Filtering {
    #[default]
    Text,
    /// After ESC.
    Escape,
    /// After ESC and `[`, with the parameters so far.
    Sequence(Vec<u8>),
    /// After the first byte of what may be a control character of two bytes.
    TwoBytes,
}

impl TerminalFilter {
    /// What the terminal gets of the next piece.
    pub(crate) fn pass(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(piece.len());
        for &byte in piece {
            self.byte(byte, &mut out);
        }
        out
    }

    /// What gives the terminal its own colours back.
    pub(crate) fn end(&self) -> &'static [u8] {
        if self.is_colored { b"\x1b[0m" } else { b"" }
    }

    fn byte(&mut self, byte: u8, out: &mut Vec<u8>) {
        match (std::mem::take(&mut self.state), byte) {
            (Filtering::Escape, b'[') => self.state = Filtering::Sequence(Vec::new()),
            (Filtering::Sequence(mut words), b'0'..=b'9' | b';' | b':')
                if words.len() < COLOR_MAX =>
            {
                words.push(byte);
                self.state = Filtering::Sequence(words);
            }
            (Filtering::Sequence(words), b'm') => {
                self.is_colored = true;
                out.extend([b"\x1b[", words.as_slice(), b"m"].concat());
            }
            (Filtering::TwoBytes, 0x80..=0x9f) => {
                out.extend(format!("\\u{{{byte:x}}}").as_bytes());
            }
            (before, byte) => {
                match before {
                    Filtering::Text => {}
                    Filtering::Escape => out.extend(b"\\u{1b}"),
                    Filtering::Sequence(words) => {
                        out.extend([b"\\u{1b}[", words.as_slice()].concat());
                    }
                    Filtering::TwoBytes => out.push(0xc2),
                }
                match byte {
                    0x1b => self.state = Filtering::Escape,
                    0xc2 => self.state = Filtering::TwoBytes,
                    b'\n' | b'\r' | b'\t' => out.push(byte),
                    0..=0x1f | 0x7f => out.extend(format!("\\u{{{byte:x}}}").as_bytes()),
                    byte => out.push(byte),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_line_cannot_steer_the_terminal() {
        assert_eq!(printable("a\tb \u{1b}[2Jc\u{9b}1m\r"), "a\tb \\u{1b}[2Jc\\u{9b}1m");
        assert_eq!(printable("one\ntwo \u{202e}x\u{2028}"), "one\\ntwo \\u{202e}x");
        assert_eq!(printable_text("one\n\u{1b}c\u{7f}\n"), "one\n\\u{1b}c\\u{7f}\n");
    }

    #[test]
    fn json_says_the_same_without_steering() {
        let value = serde_json::json!({ "a": "\u{1b}[2J \u{9b}x \u{7f} \u{202e} \" ü" });
        let text = printable_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || !steers(c)), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn a_log_keeps_its_colours_and_nothing_else() {
        let log =
            "\u{1b}[1;31mred\u{1b}[0m\u{1b}[2J\u{1b}]0;title\u{7} \u{9b}1m ü\u{a0}\r\n\u{1b}[31";
        let shown = "\u{1b}[1;31mred\u{1b}[0m\\u{1b}[2J\\u{1b}]0;title\\u{7} \\u{9b}1m ü\u{a0}\r\n";
        for size in 1..8 {
            let mut filter = TerminalFilter::default();
            let pieces = log.as_bytes().chunks(size);
            let out: Vec<u8> = pieces.flat_map(|piece| filter.pass(piece)).collect();
            assert_eq!(String::from_utf8(out).unwrap(), shown, "{size}");
            assert_eq!(filter.end(), b"\x1b[0m");
        }
        let mut filter = TerminalFilter::default();
        assert_eq!(
            filter.pass(b"plain\n\x1b[999999999999999999999999999999999999m"),
            { b"plain\n\\u{1b}[99999999999999999999999999999999999" as &[u8] }
                .iter()
                .chain(b"9m")
                .copied()
                .collect::<Vec<u8>>()
        );
        assert_eq!(filter.end(), b"");
    }
}
