//! Tables without borders, and lists of fields. A cell is one line, whatever a stranger put into it.

use unicode_width::UnicodeWidthStr as _;

use super::printable;

/// Blanks between columns.
const GAP: usize = 3;

/// A table with upper-case headers.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut all = vec![header.map(str::to_owned)];
    all.extend(rows.into_iter().map(|row| row.map(|cell| printable(&cell))));
    render(&all)
}

/// Fields of one object, one below the other.
pub(crate) fn fields<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows = fields.into_iter().map(|(name, value)| [format!("{name}:"), printable(&value)]);
    render(&rows.collect::<Vec<_>>())
}

/// Aligns columns to the left, by the cells' width on a terminal.
fn render<const N: usize>(rows: &[[String; N]]) -> String {
    let mut columns = [0; N];
    for row in rows {
        for (column, cell) in columns.iter_mut().zip(row) {
            *column = width(cell).max(*column);
        }
    }
    let blanks = " ".repeat(columns.iter().max().unwrap_or(&0) + GAP);
    let mut text = String::with_capacity(rows.len() * (columns.iter().sum::<usize>() + N * GAP));
    for row in rows {
        for (column, cell) in columns.iter().zip(row) {
            text.push_str(cell);
            text.push_str(&blanks[..column - width(cell) + GAP]);
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    text.pop();
    text
}

/// Columns that a text takes on a terminal.
fn width(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.width() }
}

/// A value that may be absent.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_without_borders_or_trailing_blanks() {
        let rows = [["demo/hello", "running"], ["a", "b"]].map(|row| row.map(str::to_owned));
        let text = table(["NAME", "STATE"], rows);
        assert_eq!(text, "NAME         STATE\ndemo/hello   running\na            b");
        assert_eq!(table(["NAME"], []), "NAME");
        let wide = [["\u{6771}\u{4eac}", "x"], ["abcd", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(["A", "B"], wide), "A      B\n\u{6771}\u{4eac}   x\nabcd");
    }

    #[test]
    fn fields_are_named() {
        let text = fields([("name", "demo".to_owned()), ("pid", or_dash::<u32>(None))]);
        assert_eq!(text, "name:   demo\npid:    -");
    }
}
