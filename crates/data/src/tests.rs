//! From files to tokens: what is read, what is kept, and what each bad input says.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;
use units::Bytes;

use crate::*;

fn no_environment(_: &str) -> Option<String> {
    None
}

fn ignore(_: Progress) {}

/// A folder holding `files`, by relative path.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    folder
}

fn pattern(folder: &TempDir, pattern: &str) -> String {
    folder.path().join(pattern).to_str().unwrap().into()
}

fn open(folder: &TempDir, patterns: &[&str]) -> Result<Corpus, Error> {
    let patterns: Vec<_> = patterns.iter().map(|written| pattern(folder, written)).collect();
    Corpus::open(&patterns, None, &no_environment)
}

fn texts(corpus: &Corpus) -> Vec<String> {
    corpus.texts().map(Result::unwrap).collect()
}

/// The message of an error, with the temporary folder's name taken out.
fn message<T>(folder: &TempDir, result: Result<T, Error>) -> String {
    let message = result.err().unwrap().to_string();
    message.replace(folder.path().to_str().unwrap(), "DIR")
}

/// Text with enough distinct words for a few hundred merges.
fn prose() -> String {
    let words = ["rank", "stage", "shard", "token", "window", "épreuve", "数据", "step"];
    let mut text = String::new();
    for index in 0..400_usize {
        let word = words[index * index % words.len()];
        text += &format!("{word}{} {}{word}.\n", index % 7, words[index % 5]);
    }
    text
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let folder = folder(&[("a.txt", prose().as_bytes())]);
    Tokenizer::train(&open(&folder, &["."]).unwrap(), 290).unwrap()
});

mod corpus {
    use super::*;

    #[test]
    fn files_folders_and_globs_are_read_in_path_order_once_each() {
        let folder = folder(&[
            ("b/two.txt", b"two"),
            ("b/deep/er/one.md", b"one"),
            ("a.rs", b"a"),
            ("c.rs", b"c"),
            ("empty.rs", b""),
            (".git/config", b"hidden"),
        ]);
        let corpus = open(&folder, &["c.rs", "b", "*.rs", "b/**/*.md"]).unwrap();
        assert_eq!(texts(&corpus), ["a", "one", "two", "c"]);
        assert_eq!((corpus.documents(), corpus.bytes()), (4, Bytes(8)));
    }

    #[test]
    fn a_glob_that_matches_a_folder_takes_the_files_below_it() {
        let folder = folder(&[
            ("a-1/src/lib.rs", b"one"),
            ("a-1/src/deep/er.rs", b"two"),
            ("a-1/tests/it.rs", b"elsewhere"),
            ("a-2/src/lib.rs", b"three"),
            ("a-2/src/.hidden", b"hidden"),
            ("a-2/src/binary", b"\0"),
        ]);
        let corpus = open(&folder, &["a-*/src"]).unwrap();
        assert_eq!(texts(&corpus), ["two", "one", "three"]);
        assert_eq!(corpus.skipped(), 1, "a folder may hold what is not text");
        let corpus = open(&folder, &["a-1/**/*"]).unwrap();
        assert_eq!(texts(&corpus), ["two", "one", "elsewhere"]);
    }

    #[test]
    fn home_and_environment_are_expanded() {
        let folder = folder(&[(".cargo/registry/x/lib.rs", b"library")]);
        let home = pattern(&folder, "");
        let environment = |name: &str| (name == "HOME").then(|| home.clone());
        let patterns = ["${CARGO_HOME:-~/.cargo}/registry/*/**/*.rs".into()];
        let corpus = Corpus::open(&patterns, None, &environment).unwrap();
        assert_eq!(texts(&corpus), ["library"]);
    }

    #[test]
    fn json_lines_hold_one_document_each() {
        let lines = b"{\"text\": \"one\\n\", \"id\": 1}\n\n{\"text\": \"\"}\n{\"text\": \"two\"}";
        let folder = folder(&[("a.jsonl", lines), ("b.txt", b"three")]);
        let corpus = open(&folder, &["."]).unwrap();
        assert_eq!(texts(&corpus), ["one\n", "two", "three"]);
    }

    #[test]
    fn what_is_not_text_is_skipped_unless_it_is_named() {
        let folder =
            folder(&[("a.txt", b"text"), ("b.bin", b"\xff\xfe\x00"), ("c.bin", b"zero \0 byte")]);
        let corpus = open(&folder, &["."]).unwrap();
        assert_eq!((texts(&corpus), corpus.skipped()), (vec!["text".into()], 2));
        assert_eq!(
            message(&folder, open(&folder, &[".", "b.bin"])),
            "DIR/b.bin is not UTF-8 text; convert it, or leave it out"
        );
        assert_eq!(
            message(&folder, open(&folder, &["*.bin"])),
            "no text in the 2 files found, of which 2 are not UTF-8; name files with text, or raise the limit"
        );
    }

    #[test]
    fn a_limit_takes_whole_documents_until_it_is_reached() {
        let lines = b"{\"text\": \"dddd\"}\n{\"text\": \"eeee\"}\nnever read";
        let folder = folder(&[("a.txt", b"aaaa"), ("b.txt", b"bbbb"), ("c.jsonl", lines)]);
        let documents = |limit| {
            let patterns = [pattern(&folder, ".")];
            Corpus::open(&patterns, Some(Bytes(limit)), &no_environment)
                .map(|corpus| texts(&corpus).concat())
        };
        assert_eq!(documents(1).unwrap(), "aaaa");
        assert_eq!(documents(4).unwrap(), "aaaa");
        assert_eq!(documents(5).unwrap(), "aaaabbbb");
        assert_eq!(documents(16).unwrap(), "aaaabbbbddddeeee");
        assert!(documents(17).is_err());
    }

    #[test]
    fn the_fingerprint_is_of_the_documents_and_not_of_their_place() {
        let fingerprint =
            |files: &[(&str, &[u8])]| open(&folder(files), &["."]).unwrap().fingerprint();
        let reference = fingerprint(&[("a", b"one"), ("b", b"two")]);
        assert_eq!(reference, fingerprint(&[("x/c", b"one"), ("x/d", b"two")]));
        assert_ne!(reference, fingerprint(&[("a", b"two"), ("b", b"one")]));
        assert_ne!(reference, fingerprint(&[("a", b"onetwo")]));
    }

    #[test]
    fn bad_patterns_and_lines_are_named() {
        let lines = b"{\"text\": \"fine\"}\n{\"txt\": 1}\n";
        let folder = folder(&[("a.jsonl", lines), ("full/a.txt", b"a"), ("empty/x/y", b"")]);
        fs::remove_file(folder.path().join("empty/x/y")).unwrap();
        assert_eq!(
            message(&folder, open(&folder, &["full", "missing/*.txt"])),
            "no file matches `DIR/missing/*.txt` (expanded to `DIR/missing/*.txt`); name a file, a folder or a glob that exists"
        );
        assert_eq!(
            message(&folder, open(&folder, &["empty"])),
            "no file matches `DIR/empty` (expanded to `DIR/empty`); name a file, a folder or a glob that exists"
        );
        let malformed = message(&folder, open(&folder, &["a**"]));
        assert!(malformed.starts_with("`DIR/a**` is not a valid pattern: "), "{malformed}");
        assert_eq!(
            message(&folder, open(&folder, &["a.jsonl"])),
            "DIR/a.jsonl, line 2: missing field `text`, column 10; each line must be {\"text\": \"...\"}"
        );
    }

    #[test]
    fn a_file_that_disappears_is_named() {
        let folder = folder(&[("a.txt", b"a")]);
        let corpus = open(&folder, &["a.txt"]).unwrap();
        fs::remove_file(folder.path().join("a.txt")).unwrap();
        assert_eq!(
            message(&folder, corpus.texts().next().unwrap()),
            "cannot read DIR/a.txt: No such file or directory (os error 2); check that it exists and may be read"
        );
    }
}

mod tokenizer {
    use super::*;

    #[test]
    fn training_fills_the_vocabulary_exactly_and_compresses() {
        let text = prose();
        assert_eq!((TOKENIZER.vocabulary(), TOKENIZER.end_of_text()), (290, 0));
        let tokens = TOKENIZER.encode(&text).unwrap();
        assert!(tokens.len() * 2 < text.len(), "{} of {}", tokens.len(), text.len());
        assert_eq!(tokens.iter().max(), Some(&289));
    }

    #[test]
    fn training_again_gives_the_same_tokenizer() {
        let folder = folder(&[("a.txt", prose().as_bytes())]);
        let corpus = open(&folder, &["."]).unwrap();
        let again = Tokenizer::train(&corpus, 290).unwrap();
        assert_eq!(again.fingerprint(), TOKENIZER.fingerprint());
    }

    #[test]
    fn a_saved_tokenizer_reads_back_the_same() {
        let folder = folder(&[]);
        let path = folder.path().join("new/tokenizer.json");
        TOKENIZER.save(&path).unwrap();
        let loaded = Tokenizer::from_file(&path).unwrap();
        assert_eq!(loaded.fingerprint(), TOKENIZER.fingerprint());
        assert_eq!(loaded.vocabulary(), 290);
        assert_eq!(loaded.encode(&prose()).unwrap(), TOKENIZER.encode(&prose()).unwrap());
    }

    #[test]
    fn text_that_spells_the_end_of_text_is_text() {
        let tokens = TOKENIZER.encode(END_OF_TEXT).unwrap();
        assert!(!tokens.contains(&TOKENIZER.end_of_text()));
        assert_eq!(TOKENIZER.decode(&tokens).unwrap(), END_OF_TEXT);
        assert_eq!(TOKENIZER.decode(&[0]).unwrap(), END_OF_TEXT);
    }

    #[test]
    fn vocabularies_out_of_reach_say_what_is_in_reach() {
        let folder = folder(&[("a.txt", b"abcabc abc")]);
        let corpus = open(&folder, &["."]).unwrap();
        assert_eq!(
            message(&folder, Tokenizer::train(&corpus, 256)),
            "a vocabulary of 256 is too small; a byte-level one needs at least 257"
        );
        assert_eq!(
            message(&folder, Tokenizer::train(&corpus, 1_000)),
            "the text fills a vocabulary of 261 only, 1000 were asked for; ask for 261 or fewer, or give more text"
        );
        assert_eq!(Tokenizer::train(&corpus, 261).unwrap().vocabulary(), 261);
    }

    #[test]
    fn files_that_are_no_tokenizer_are_named() {
        let folder = folder(&[("a.json", b"{}"), ("b.json", WITHOUT_END)]);
        let load = |name: &str| Tokenizer::from_file(&folder.path().join(name));
        let message = |name| message(&folder, load(name));
        assert!(message("a.json").starts_with("DIR/a.json is not a usable tokenizer: "));
        assert_eq!(
            message("b.json"),
            "DIR/b.json is not a usable tokenizer: it has none of the end-of-text tokens <|end_of_text|>, <|endoftext|>, </s>, <eos>, <|eot_id|>; give a Hugging Face tokenizer.json"
        );
        assert!(message("c.json").starts_with("cannot read DIR/c.json: No such file"));
    }

    const WITHOUT_END: &[u8] = br#"{"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;

    proptest! {
        #[test]
        fn every_text_survives_encoding_and_decoding(text in any::<String>()) {
            let tokens = TOKENIZER.encode(&text).unwrap();
            prop_assert_eq!(TOKENIZER.decode(&tokens).unwrap(), text);
        }
    }
}

mod tokens {
    use super::*;

    fn build(folder: &TempDir, tokenizer: &Tokenizer) -> TokenFile {
        let corpus = open(folder, &["text"]).unwrap();
        let path = folder.path().join("cache/tokens.bin");
        TokenFile::build(&corpus, tokenizer, &path, &mut ignore).unwrap()
    }

    fn all(file: &TokenFile) -> Vec<u32> {
        let mut tokens = vec![0; usize::try_from(file.tokens()).unwrap()];
        file.window(0, &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn documents_follow_each_other_with_an_end_of_text_after_each() {
        let folder = folder(&[("text/a", b"rank 0"), ("text/b", "数据".as_bytes())]);
        let file = build(&folder, &TOKENIZER);
        let expected = [
            TOKENIZER.encode("rank 0").unwrap(),
            vec![0],
            TOKENIZER.encode("数据").unwrap(),
            vec![0],
        ]
        .concat();
        assert_eq!((all(&file), file.vocabulary()), (expected.clone(), 290));
        let mut window = [0; 3];
        file.window(2, &mut window).unwrap();
        assert_eq!(window, expected[2..5]);
    }

    #[test]
    fn a_large_vocabulary_takes_four_bytes_a_token() {
        let json = br#"{"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": {"a": 65536, "b": 1, "</s>": 2}, "merges": []}}"#;
        let folder = folder(&[("text/a", b"aba"), ("tokenizer.json", json)]);
        let tokenizer = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
        let file = build(&folder, &tokenizer);
        assert_eq!((all(&file), file.vocabulary()), (vec![65_536, 1, 65_536, 2], 65_537));
    }

    #[test]
    fn many_batches_keep_their_order_and_report_progress() {
        let long = prose().repeat(60);
        let names: Vec<String> = (0..5).map(|index| format!("text/{index}")).collect();
        let files: Vec<_> = names.iter().map(|name| (name.as_str(), long.as_bytes())).collect();
        let folder = folder(&files);
        let corpus = open(&folder, &["text"]).unwrap();
        let mut heard = Vec::new();
        let path = folder.path().join("tokens.bin");
        let file = TokenFile::build(&corpus, &TOKENIZER, &path, &mut |progress| {
            heard.push(progress);
        })
        .unwrap();
        let mut document = TOKENIZER.encode(&long).unwrap();
        document.push(0);
        assert_eq!(all(&file), document.repeat(5));
        assert!(heard.len() > 1 && heard.is_sorted_by_key(|progress| progress.done));
        assert_eq!(heard.last().unwrap().done, corpus.bytes());
    }

    #[test]
    fn text_that_changed_since_it_was_opened_is_refused() {
        let folder = folder(&[("text/a", b"before")]);
        let corpus = open(&folder, &["text"]).unwrap();
        fs::write(folder.path().join("text/a"), "after!").unwrap();
        let path = folder.path().join("tokens.bin");
        assert_eq!(
            message(&folder, TokenFile::build(&corpus, &TOKENIZER, &path, &mut ignore)),
            "the text changed while it was being prepared; run again once nothing writes to it"
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a file was left behind");
    }

    /// What opening says after `damage` was done to the bytes of a good file of 4 + 1 tokens.
    fn after(damage: impl FnOnce(&mut Vec<u8>)) -> String {
        let folder = folder(&[("text/a", b"wxyz")]);
        let path = build(&folder, &TOKENIZER).path().to_path_buf();
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        message(&folder, TokenFile::open(&path))
    }

    #[test]
    fn damaged_files_are_refused_with_what_to_do() {
        let says = |reason: &str| {
            format!(
                "DIR/cache/tokens.bin is damaged: {reason}; delete it, and the next run builds it again"
            )
        };
        assert_eq!(after(|bytes| bytes[0] ^= 1), says("it is not a token file"));
        assert_eq!(after(|bytes| bytes[8] = 9), says("it has version 9, this program reads 1"));
        assert_eq!(after(|bytes| bytes.truncate(20)), says("20 B is too short for its header"));
        assert_eq!(
            after(|bytes| bytes.truncate(68)),
            says("it holds 8 bytes of tokens where its header says 5 tokens of 2")
        );
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let length = crate::tokens::Header::BYTES + 10;
        for index in 12..length {
            let message = after(|bytes| {
                assert_eq!(bytes.len(), length);
                bytes[index] ^= 0x40;
            });
            assert!(message.contains("is damaged"), "byte {index}: {message}");
        }
    }

    #[test]
    #[should_panic(expected = "window of 9 tokens at 1 in a file of 5")]
    fn a_window_beyond_the_end_is_a_bug() {
        let folder = folder(&[("text/a", b"wxyz")]);
        let _ = build(&folder, &TOKENIZER).window(1, &mut [0; 9]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = folder(&[("text/a", b"a"), ("cache", b"a file, not a folder")]);
        let corpus = open(&folder, &["text"]).unwrap();
        let path = folder.path().join("cache/tokens.bin");
        let result = TokenFile::build(&corpus, &TOKENIZER, &path, &mut ignore);
        assert!(message(&folder, result).starts_with("cannot write DIR/cache/tokens.bin: "));
    }
}

mod prepare {
    use super::*;

    fn source(folder: &TempDir) -> Source {
        Source {
            patterns: vec![pattern(folder, "text")],
            limit: None,
            tokenizer: TokenizerSource::Train { vocabulary: 290 },
        }
    }

    /// Prepares, and counts the progress reports of each stage.
    fn prepare(folder: &TempDir, source: &Source) -> (Prepared, [usize; 2]) {
        let mut heard = [0; 2];
        let cache = folder.path().join("cache");
        let mut progress = |progress: Progress| heard[progress.stage as usize] += 1;
        let prepared = crate::prepare(source, &cache, &no_environment, &mut progress).unwrap();
        (prepared, heard)
    }

    fn cached(folder: &TempDir) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder.path().join("cache")).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    #[test]
    fn what_is_cached_is_used_again_and_what_changed_is_not() {
        let folder = folder(&[("text/a", prose().as_bytes())]);
        let (first, heard) = prepare(&folder, &source(&folder));
        assert_eq!(heard, [2, 1]);
        assert_eq!((first.documents, first.bytes), (1, Bytes(prose().len() as u64)));
        let (again, heard) = prepare(&folder, &source(&folder));
        assert_eq!(heard, [0, 0]);
        assert_eq!(again.tokens.fingerprint(), first.tokens.fingerprint());

        fs::write(folder.path().join("text/b"), "more").unwrap();
        let (changed, heard) = prepare(&folder, &source(&folder));
        assert_eq!(heard, [2, 1]);
        assert_ne!(changed.tokens.fingerprint(), first.tokens.fingerprint());
    }

    #[test]
    fn damaged_caches_are_built_again_with_the_same_bytes() {
        let folder = folder(&[("text/a", prose().as_bytes())]);
        prepare(&folder, &source(&folder));
        let contents = |paths: &[PathBuf]| -> Vec<Vec<u8>> {
            paths.iter().map(|path| fs::read(path).unwrap()).collect()
        };
        let paths = cached(&folder);
        let good = contents(&paths);
        for path in &paths {
            fs::write(path, "damage").unwrap();
        }
        assert_eq!(prepare(&folder, &source(&folder)).1, [2, 1]);
        assert_eq!(contents(&cached(&folder)), good);
    }

    #[test]
    fn a_tokenizer_file_is_taken_as_it_is() {
        let folder = folder(&[("text/a", prose().as_bytes())]);
        TOKENIZER.save(&folder.path().join("tokenizer.json")).unwrap();
        let path = TokenizerSource::File(pattern(&folder, "tokenizer.json"));
        let (prepared, heard) = prepare(&folder, &Source { tokenizer: path, ..source(&folder) });
        assert_eq!((heard, prepared.tokens.vocabulary()), ([0, 1], 290));
    }

    #[test]
    fn many_at_once_prepare_the_same_bytes() {
        let folder = folder(&[("text/a", prose().as_bytes())]);
        let fingerprints: Vec<u128> = thread::scope(|scope| {
            let prepare = || {
                let (prepared, _) = prepare(&folder, &source(&folder));
                assert_eq!(prepared.tokens.vocabulary(), 290);
                prepared.tokens.fingerprint()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(prepare)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
        assert_eq!(cached(&folder).len(), 2, "a temporary file was left behind");
    }

    #[test]
    fn the_sampler_reads_the_text_back() {
        let folder = folder(&[("text/a", prose().as_bytes())]);
        let (prepared, _) = prepare(&folder, &source(&folder));
        let sampling =
            Sampling { sequence: 16, global_batch: 2, seed: 1, held_out: Sampling::HELD_OUT };
        let sampler = Sampler::new(prepared.tokens.tokens(), sampling).unwrap();
        let mut window = [0; 17];
        for index in 0..sampler.windows_per_epoch() {
            prepared.tokens.window(sampler.train_window(index).start, &mut window).unwrap();
            let text = prepared.tokenizer.decode(&window[1..16]).unwrap();
            let whole = text.trim_matches('\u{fffd}');
            assert!(prose().contains(whole), "{whole}");
        }
    }
}
