//! Reads the document of `mvm up` and `mvm down`: TOML or YAML, from a file or standard input.
//!
//! A document that does not parse is refused with its file, line and column.

use std::io::{self, Read};
use std::path::Path;

use mvm_core::spec::Document;

use crate::image_source::absolute;
use crate::units::SUBNET_EXPECTED;

/// The language of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Toml,
    Yaml,
}

/// Why a document cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DocumentError {
    /// The file cannot be read.
    #[error("cannot read {name}: {source}")]
    Read {
        /// The file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file's name does not tell its language.
    #[error(
        "cannot tell the language of {name}: expected a name that ends in .toml, .yaml, .yml or .json"
    )]
    Language {
        /// The file.
        name: String,
    },
    /// The text is not a document.
    #[error("{name}{place}: {message}{line}")]
    Parse {
        /// The file.
        name: String,
        /// `:LINE:COLUMN`, if known.
        place: String,
        /// What is wrong.
        message: String,
        /// The line itself with a mark below, if known.
        line: String,
    },
}

/// Reads a document; `-` is standard input.
pub(crate) fn read(path: &Path) -> Result<Document, DocumentError> {
    if path == Path::new("-") {
        let name = "standard input".to_owned();
        let mut text = String::new();
        if let Err(source) = io::stdin().lock().read_to_string(&mut text) {
            return Err(DocumentError::Read { name, source });
        }
        return located(parse(&name, &text, guess(&text))?, path);
    }
    let name = path.display().to_string();
    let language = match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => Language::Toml,
        // JSON is YAML.
        Some("yaml" | "yml" | "json") => Language::Yaml,
        _ => return Err(DocumentError::Language { name }),
    };
    match std::fs::read_to_string(path) {
        Ok(text) => located(parse(&name, &text, language)?, path),
        Err(source) => Err(DocumentError::Read { name, source }),
    }
}

/// The document with its images' relative paths taken from its own directory.
fn located(mut document: Document, path: &Path) -> Result<Document, DocumentError> {
    let base = |source| DocumentError::Read { name: path.display().to_string(), source };
    let path = std::path::absolute(path).map_err(base)?;
    let base = path.parent().unwrap_or(Path::new("/"));
    for pool in document.pools.values_mut() {
        let image = std::mem::take(&mut pool.spec.image);
        pool.spec.image = absolute(image, base).map_err(|message| DocumentError::Parse {
            name: path.display().to_string(),
            place: String::new(),
            message,
            line: String::new(),
        })?;
    }
    Ok(document)
}

/// The language of a text without a name: the first line with content tells `key = value` and
/// `[table]` from `key: value` and `{`.
fn guess(text: &str) -> Language {
    let content = |line: &&str| !line.is_empty() && !line.starts_with('#') && *line != "---";
    match text.lines().map(str::trim).find(content) {
        Some(line) if line.starts_with('[') => Language::Toml,
        Some(line) => match (line.find('='), line.find(':')) {
            (Some(equals), Some(colon)) if equals < colon => Language::Toml,
            (Some(_), None) => Language::Toml,
            _ => Language::Yaml,
        },
        None => Language::Yaml,
    }
}

fn parse(name: &str, text: &str, language: Language) -> Result<Document, DocumentError> {
    let (message, at) = match language {
        Language::Toml => match toml::from_str(text) {
            Ok(document) => return Ok(document),
            Err(error) => {
                (error.message().to_owned(), error.span().map(|s| position(text, s.start)))
            }
        },
        Language::Yaml => match serde_saphyr::from_str(text) {
            Ok(document) => return Ok(document),
            Err(error) => {
                let at = error.location().map(|at| (at.line() as usize, at.column() as usize));
                (yaml_message(&error), at.filter(|(line, _)| *line > 0))
            }
        },
    };
    let (place, line) = match at {
        None => (String::new(), String::new()),
        Some((line, column)) => (format!(":{line}:{column}"), marked(text, line, column)),
    };
    Err(DocumentError::Parse { name: name.to_owned(), place, message: plain(message), line })
}

/// The message for someone who does not write programs: parsers name types of their own language.
fn plain(message: String) -> String {
    if let Some(rest) = message.strip_prefix("duplicate mapping key: ") {
        let key = rest.split(", set ").next().unwrap_or(rest);
        return format!("`{key}` is there twice");
    }
    match message.as_str() {
        "invalid IP address syntax" => return format!("expected {SUBNET_EXPECTED}"),
        "expected mapping start" => return "expected fields, as in `name: value`".to_owned(),
        "expected sequence start" => return "expected a list, as in `[a, b]`".to_owned(),
        "integer number overflowed" => return "the number is too large".to_owned(),
        message if message.starts_with("unknown field `keep_vmm`") => {
            return "keep_vmm was removed: sleeping instances keep no process".to_owned();
        }
        "duplicate key" => return "this is there twice".to_owned(),
        message if message.contains("weak recursion") => {
            return "an alias is within what it stands for".to_owned();
        }
        _ => {}
    }
    let is_number = |word: &str| matches!(word, "u16" | "u32" | "u64" | "i64" | "i128" | "u128");
    match message.rsplit_once(' ') {
        Some((rest, word)) if is_number(word.trim_end_matches('`').trim_start_matches('`')) => {
            let number = match word {
                "u32" => format!("a whole number from 0 to {}", u32::MAX),
                _ => "a whole number, 0 or more".to_owned(),
            };
            match rest.strip_suffix(", expected") {
                Some(found) => format!("{found}, expected {number}"),
                None => format!("expected {number}"),
            }
        }
        _ => message,
    }
}

/// The message without the place, which is shown in the same way for both languages.
fn yaml_message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or_default();
    let text = match text.rfind(" at line ") {
        Some(at) => &text[..at],
        None => text,
    };
    match text.strip_prefix("error: ").unwrap_or(text).split_once(": ") {
        Some((place, rest)) if place.starts_with("line ") => rest.to_owned(),
        _ => text.to_owned(),
    }
}

/// The 1-based line and column of a byte.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(at)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn marked(text: &str, line: usize, column: usize) -> String {
    let Some(content) = text.lines().nth(line - 1) else { return String::new() };
    // Tabs stay tabs, so that the mark stands below its column.
    let blank = |c| if c == '\t' { '\t' } else { ' ' };
    let pad: String = content.chars().take(column.saturating_sub(1)).map(blank).collect();
    format!("\n  | {content}\n  | {pad}^")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(name: &str, text: &str, language: Language) -> String {
        parse(name, text, language).unwrap_err().to_string()
    }

    #[test]
    fn the_examples_are_the_same_document_in_both_languages() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
        let toml = read(&examples.join("hello.toml")).unwrap();
        assert_eq!(toml, read(&examples.join("hello.yaml")).unwrap());
        assert_eq!(toml.pools.len(), 1);
    }

    #[test]
    fn images_beside_the_document_are_found_from_everywhere() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fleet.toml");
        std::fs::write(&file, "tenant = \"a\"\n[pools.b]\nimage = \"oci:layout:v1\"\n").unwrap();
        let image = &read(&file).unwrap().pools.into_values().next().unwrap().spec.image;
        assert_eq!(image.to_string(), format!("oci:{}:v1", dir.path().join("layout").display()));
    }

    #[test]
    fn an_unknown_field_is_shown_with_its_place_and_the_allowed_ones() {
        let toml = "tenant = \"demo\"\n[pools.hello]\n  memory = 3\n";
        let yaml = "tenant: demo\npools:\n  hello:\n    memory: 3\n";
        for (text, language, place, mark) in [
            (toml, Language::Toml, "f:3:3: ", "\n  |   memory = 3\n  |   ^"),
            (yaml, Language::Yaml, "f:4:5: ", "\n  |     memory: 3\n  |     ^"),
        ] {
            let error = failure("f", text, language);
            assert!(error.starts_with(place), "{error}");
            assert!(error.ends_with(mark), "{error}");
            for part in ["unknown field `memory`", "mem_mib", "boot_timeout_s"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }

    #[test]
    fn a_field_of_an_earlier_release_is_said_to_be_gone() {
        let toml = "tenant = \"a\"\n[pools.b.sleep_policy]\nkeep_vmm = false\n";
        let yaml = "tenant: a\npools:\n  b:\n    sleep_policy:\n      keep_vmm: false\n";
        for (text, language, place) in
            [(toml, Language::Toml, "f:3:1: "), (yaml, Language::Yaml, "f:5:7: ")]
        {
            let error = failure("f", text, language);
            let expected =
                format!("{place}keep_vmm was removed: sleeping instances keep no process\n");
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_shown_with_its_place() {
        let error = failure("f", "tenant = \"De mo\"\n", Language::Toml);
        assert!(error.starts_with("f:1:10: "), "{error}");
        assert!(error.contains("tenant name `De mo`"), "{error}");
        let error = failure("f", "tenant: demo\npools:\n  a:\n    vcpus: many\n", Language::Yaml);
        assert!(error.starts_with("f:4:12: expected a whole number"), "{error}");
        let error = failure("f", "tenant = \"a\"\n[quota]\nvcpus = \"2\"\n", Language::Toml);
        let expected = "f:3:9: invalid type: string \"2\", expected a whole number, 0 or more\n";
        assert!(error.starts_with(expected), "{error}");
        for text in ["tenant = \"a\"\nsubnet = \"10.1.0.0\"\n", "subnet = \"x\"\n"] {
            let error = failure("f", text, Language::Toml);
            assert!(error.contains("expected a subnet such as 10.240.7.0/24"), "{error}");
        }
    }

    #[test]
    fn no_message_is_in_a_parsers_own_words() {
        let pool = |line: &str| {
            (
                format!("tenant = \"a\"\n[pools.b]\n{}\n", line.replacen(": ", " = ", 1)),
                format!("tenant: a\npools:\n  b:\n    {line}\n"),
            )
        };
        let mut documents = vec![
            ("tenant = \"a\"\ntenant = \"b\"\n".to_owned(), "tenant: a\ntenant: b\n".to_owned()),
            ("[[pools]]\n".to_owned(), "- a\n".to_owned()),
            ("tenant = 1\n".to_owned(), "tenant: [1]\n".to_owned()),
            ("pools = 1\n".to_owned(), "tenant: a\npools: [1, 2]\n".to_owned()),
            ("pools = [1\n".to_owned(), "tenant: a\npools: &x\n  b: *x\n".to_owned()),
            (
                "[disks.a]\nsize_mib = -1\n".to_owned(),
                "disks:\n  a:\n    size_mib: -1\n".to_owned(),
            ),
        ];
        documents.extend([
            pool("running: -1"),
            pool("running: 1.5"),
            pool("running: true"),
            pool("running: 5000000000"),
            pool("running: 99999999999999999999999999999999999999999"),
            pool("running: -99999999999999999999999999999999999999999"),
            pool("disks: 3"),
            pool("env: [1]"),
            pool("rates: {net_mbit_s: -1}"),
            pool("sleep_policy: {warm_after_s: x}"),
        ]);
        for (toml, yaml) in documents {
            for (text, language) in [(toml, Language::Toml), (yaml, Language::Yaml)] {
                let error = failure("f", &text, language);
                let message = error.lines().next().unwrap();
                for word in [
                    "u16",
                    "u32",
                    "u64",
                    "i64",
                    "i128",
                    "u128",
                    "f64",
                    "Policy",
                    "Options",
                    "weak",
                    "mapping start",
                    "struct ",
                    "::",
                ] {
                    assert!(!message.contains(word), "{text}{message}");
                }
            }
        }
        let error = failure("f", "tenant: a\npools:\n  b:\n    running: -1\n", Language::Yaml);
        assert!(
            error.starts_with("f:4:14: expected a whole number from 0 to 4294967295"),
            "{error}"
        );
    }

    #[test]
    fn text_that_is_neither_language_is_refused() {
        assert!(failure("f", "tenant = ", Language::Toml).starts_with("f:1:"));
        assert!(failure("f", "a: [", Language::Yaml).starts_with("f:"));
        assert!(failure("f", "", Language::Yaml).starts_with('f'));
    }

    #[test]
    fn standard_inputs_language_is_told_from_its_content() {
        for (text, language) in [
            ("# x\n\ntenant = \"demo\"\n", Language::Toml),
            ("[quota]\nvcpus = 1\n", Language::Toml),
            ("name = \"a:b\"\n", Language::Toml),
            ("---\ntenant: demo\n", Language::Yaml),
            ("tenant: a=b\n", Language::Yaml),
            ("{\"tenant\": \"demo\"}\n", Language::Yaml),
            ("", Language::Yaml),
        ] {
            assert_eq!(guess(text), language, "{text:?}");
        }
    }

    #[test]
    fn a_file_of_another_kind_is_refused_by_name() {
        let error = read(Path::new("/tmp/fleet.ini")).unwrap_err();
        assert!(error.to_string().contains("fleet.ini"));
        let error = read(Path::new("/no/such/fleet.toml")).unwrap_err();
        assert!(error.to_string().starts_with("cannot read /no/such/fleet.toml"));
    }
}
